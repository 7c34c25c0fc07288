"""What a step of fine-tuning depends on beside the weights: its learning rate and its sequences."""

from __future__ import annotations

from functools import lru_cache

import torch

WARMUP = 0.1  # share of the steps
FINAL = 0.02  # share of the peak rate at the last step


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then linear to 2% of the peak; ``step`` from 0.

    Examples:
        >>> from monge.conversion.schedule import learning_rate
        >>> [round(learning_rate(step, 101, 1.0), 3) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.51, 0.02]
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (1 - (1 - FINAL) * done)


def sequences_of(step: int, batch: int, count: int, seed: int) -> list[int]:
    """The sequences of a step (from 0), out of ``count``. An epoch visits all once, in an order of its own.

    Examples:
        >>> from monge.conversion.schedule import sequences_of
        >>> sorted(sequences_of(0, 2, 4, seed=0) + sequences_of(1, 2, 4, seed=0))
        [0, 1, 2, 3]
    """
    places = (divmod(place, count) for place in range(step * batch, (step + 1) * batch))
    return [_order(count, seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
