"""Corrupted text, and what it costs: the loss of the tokens left alone where others around them are not.

A share of a window is replaced by random tokens, or of its words exchanged with their neighbours. The loss is
counted on targets that the corruption left in place, and compared with the loss of the same targets in intact
text, so the corrupted tokens themselves, which nothing could predict, do not count. The same seed corrupts
the windows of every model alike.

Shapes: N windows, S context; a window has S + 1 tokens.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from monge.lab.config import ExperimentConfig
from monge.lab.examples import losses_of, window_examples
from monge.lab.models import evaluation_mode

SHARES = (0.05, 0.15, 0.3)
WINDOWS = 128  # the first of the (shuffled) validation windows

Corrupted = tuple[Tensor, Tensor]
"""(N, S + 1) windows, and bool, True where a token is no longer what or where it was."""


def random_tokens(windows_NS: Tensor, share: float, vocab: int) -> Corrupted:
    """Every token is, with probability ``share``, replaced by one drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    changed_NS = torch.rand(windows_NS.shape, generator=generator) < share
    drawn_NS = torch.randint(vocab, windows_NS.shape, generator=generator)
    return torch.where(changed_NS, drawn_NS, windows_NS), changed_NS


def swapped_words(windows_NS: Tensor, share: float, begins_V: Tensor) -> Corrupted:
    """About the share ``share`` of the words of every window change places with a neighbour.

    Args:
        windows_NS: (N, S + 1) token ids.
        share: of the words.
        begins_V: (V,) bool, whether a token of the vocabulary begins a word.
    """
    windows, changed = windows_NS.clone(), torch.zeros_like(windows_NS, dtype=torch.bool)
    for row, window_S in enumerate(windows_NS):
        draw = random.Random(row)
        starts = begins_V[window_S].nonzero().flatten().tolist()
        # pairs of neighbours: words 0 and 1, 2 and 3, ...; whole words only
        for a, b, c in zip(starts[:-2:2], starts[1:-1:2], starts[2::2]):
            if draw.random() < share:
                windows[row, a:c] = torch.cat([window_S[b:c], window_S[a:b]])
                changed[row, a:c] = True
    return windows, changed


@torch.no_grad()
def loss_increases(
    model: nn.Module, windows_NS: Tensor, begins_V: Tensor, config: ExperimentConfig
) -> dict[str, dict[str, float]]:
    """{"random tokens": {share: nats per token}, "swapped words": {...}}; see the module's docstring."""
    windows_NS = windows_NS[:WINDOWS]
    with evaluation_mode(model):
        intact_NS = _losses(model, windows_NS, config)
        table: dict[str, dict[str, float]] = {"random tokens": {}, "swapped words": {}}
        for share in SHARES:
            for name, (corrupted_NS, changed_NS) in (
                ("random tokens", random_tokens(windows_NS, share, len(begins_V))),
                ("swapped words", swapped_words(windows_NS, share, begins_V)),
            ):
                kept_NS = ~changed_NS[:, 1:]
                difference_NS = _losses(model, corrupted_NS, config) - intact_NS
                table[name][f"{share:g}"] = float(difference_NS[kept_NS].mean())
    return table


def _losses(model: nn.Module, windows_NS: Tensor, config: ExperimentConfig) -> Tensor:
    """(N, S) float64 losses of every target."""
    batches = window_examples(windows_NS).batches(config)
    flat = torch.cat([losses_of(model, batch).cpu().double() for batch in batches])
    return flat.view(len(windows_NS), -1)
