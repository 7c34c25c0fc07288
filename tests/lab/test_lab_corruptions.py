"""Corruptions change what they say they change, by as much as they say, and nothing else."""

from __future__ import annotations

import pytest
import torch
from lab.made import corpus_of, random_windows
from torch import nn

from monge.lab.image_corruptions import CORRUPTIONS, accuracies, blur, contrast, occlusion, salt, shift
from monge.lab.models import build_model
from monge.lab.text_corruptions import SHARES, loss_increases, random_tokens, swapped_words


def _images(count: int = 40, channels: int = 1, side: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_random_tokens_replace_a_share_and_say_which(share):
    windows_NS = torch.randint(1000, (50, 65), generator=torch.Generator().manual_seed(0))
    corrupted_NS, changed_NS = random_tokens(windows_NS, share, 1000)
    assert torch.equal(corrupted_NS[~changed_NS], windows_NS[~changed_NS])
    assert changed_NS.float().mean() == pytest.approx(share, abs=0.02)
    assert (corrupted_NS != windows_NS)[changed_NS].float().mean() > 0.99
    again, _ = random_tokens(windows_NS, share, 1000)
    assert torch.equal(corrupted_NS, again)


def test_swapped_words_exchange_neighbours_and_keep_every_token():
    begins_V = torch.tensor([True, True, True, False])
    window = torch.tensor([[3, 0, 3, 3, 1, 2, 3, 0, 1]])  # half a word, then 0 3 3 | 1 | 2 3 | 0 | 1 ...
    corrupted, changed = swapped_words(window, 1.0, begins_V)
    assert corrupted.tolist() == [[3, 1, 0, 3, 3, 0, 2, 3, 1]]
    assert changed.tolist() == [[False] + [True] * 7 + [False]]  # the last word may go on: it stays
    intact, none = swapped_words(window, 0.0, begins_V)
    assert torch.equal(intact, window)
    assert not none.any()


def test_the_share_of_swapped_words_is_that_asked_for():
    begins_V = torch.arange(30) % 3 == 0
    windows_NS = torch.randint(30, (200, 129), generator=torch.Generator().manual_seed(0))
    corrupted_NS, changed_NS = swapped_words(windows_NS, 0.15, begins_V)
    assert changed_NS.float().mean() == pytest.approx(0.15, abs=0.02)
    assert torch.equal(corrupted_NS.sort(dim=1).values, windows_NS.sort(dim=1).values)
    assert torch.equal(corrupted_NS[~changed_NS], windows_NS[~changed_NS])


class Unigram(nn.Module):
    """Predicts the next token from nothing: no context can be corrupted."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.logits_V = nn.Parameter(torch.randn(vocab, generator=torch.Generator().manual_seed(0)))

    def forward(self, inputs):
        output = nn.Module()
        output.logits = self.logits_V.expand(*inputs.shape, -1)
        return output


def test_only_corrupted_context_costs_not_the_corrupted_tokens(make_config):
    config = make_config()
    corpus = corpus_of(random_windows(config, 16), config)
    table = loss_increases(Unigram(config.vocab), corpus.val_NS, corpus.begins_V, config)
    for by_share in table.values():
        assert list(by_share) == [f"{share:g}" for share in SHARES]
        assert list(by_share.values()) == pytest.approx([0.0] * 3, abs=1e-9)
    model = build_model("topk", config, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # a model that does look at its context
    table = loss_increases(model, corpus.val_NS, corpus.begins_V, config)
    assert all(abs(value) > 1e-3 for by_share in table.values() for value in by_share.values())


@pytest.mark.parametrize("name", list(CORRUPTIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_corrupted_images_stay_images_and_grow_worse(name, channels):
    corrupt, strengths = CORRUPTIONS[name]
    images_NCHW, distances = _images(channels=channels), []
    for strength in strengths:
        corrupted = corrupt(images_NCHW, strength, torch.Generator().manual_seed(0))
        assert corrupted.shape == images_NCHW.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        again = corrupt(images_NCHW, strength, torch.Generator().manual_seed(0))
        assert torch.equal(corrupted, again)
        distances.append(float((corrupted - images_NCHW).square().mean()))
    assert distances[0] > 0
    if name != "shift":  # of random pixels every shift is as far
        assert distances == sorted(distances)


def test_exact_corruptions():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((2, 1, 8, 8), 0.25)
    assert blur(flat, 0.1, generator) == pytest.approx(flat)
    images = _images()
    assert torch.allclose(contrast(images, 1.0, generator), images.mean(dim=(1, 2, 3), keepdim=True))
    covered = (occlusion(images, 0.5, generator) != images).sum(dim=(1, 2, 3))
    assert covered.tolist() == [16] * len(images)
    moved = shift(images, 0.125, generator)
    rolls = [images.roll(by, dims) for dims in (2, 3) for by in (1, -1)]
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert all(any(torch.equal(m[inner[1:]], r[i][inner[1:]]) for r in rolls) for i, m in enumerate(moved))
    salted = salt(images, 0.2, generator)
    assert (salted != images).float().mean() == pytest.approx(0.2, abs=0.03)
    assert set(salted[salted != images].tolist()) == {0.0, 1.0}


def test_accuracies_count_first_choices(make_config):
    class Brightness(nn.Module):
        def forward(self, images):
            output = nn.Module()
            bright_N = images.mean(dim=(1, 2, 3)) > 0.5
            output.logits = torch.stack([~bright_N, bright_N], dim=1).float()
            return output

    images = torch.cat([torch.full((3, 1, 8, 8), 0.2), torch.full((5, 1, 8, 8), 0.8)])
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])  # two of eight are called otherwise
    clean, table = accuracies(Brightness(), images, labels, lambda x: x, make_config())
    assert clean == 0.75
    assert set(table) == set(CORRUPTIONS)
    assert table["blur"] == {"0.05": 0.75, "0.1": 0.75, "0.2": 0.75}
