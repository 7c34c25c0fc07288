"""What every run shares whatever its router: the order of the data, the learning rate and AdamW.

Shapes: N windows, S context.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from monge.lab.config import ExperimentConfig

_EMBEDDINGS = ("embed_tokens.weight", "position_embeddings", "cls_token")


def batch_of(windows_NS: Tensor, size: int, seed: int, step: int) -> Tensor:
    """(size, S + 1) windows of step `step`, from 0. An epoch visits all once, in an order of its own."""
    return windows_NS[batch_rows(len(windows_NS), size, seed, step)]


def batch_rows(count: int, size: int, seed: int, step: int) -> list[int]:
    """Which of ``count`` examples those are."""
    places = (divmod(place, count) for place in range(step * size, (step + 1) * size))
    return [_order(count, seed, epoch)[index] for epoch, index in places]


def learning_rate(step: int, config: ExperimentConfig) -> float:
    """Linear warm-up to the peak, then a cosine to ``final_lr`` of it at the last step; `step` counts from 0.

    Examples:
        >>> from monge.lab import CompareConfig
        >>> config = CompareConfig(lr=1.0, warmup=10, steps=101, final_lr=0.1)
        >>> [round(learning_rate(step, config), 3) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: nn.Module, config: ExperimentConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay on all but routers, norms, biases and embeddings."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or ".router." in name or name.endswith(_EMBEDDINGS)
        (free if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


@lru_cache(maxsize=4)
def _order(windows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(windows, generator=generator).tolist()
