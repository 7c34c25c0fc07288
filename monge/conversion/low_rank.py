"""Low-rank updates: train ``W + B A`` in place of W, and merge the product into W at the end.

What it saves is memory: gradients and AdamW's moments belong to A and B. The layers compute with the sum, so
that merging changes nothing, not even the last bit; a step takes about as long as with all weights.

Shapes: O rows and I columns of a weight, R rank, E experts (stacked weights are (E, O, I)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monge.conversion.teacher import head_module
from monge.routing import Router


class LowRank(nn.Module):
    """``W -> W + B A``, A (..., R, I) drawn from N(0, 1/I), B (..., O, R) zero: the start is W itself.

    Source: arXiv 2106.09685 (LoRA), eq. 3.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *lead, O, I = weight.shape
        a = torch.randn((*lead, rank, I), generator=generator) / I**0.5
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros((*lead, O, rank)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@contextmanager
def low_rank_updates(model: nn.Module, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Within the context every matrix of ``model``'s layers has a trainable update of ``rank``.

    Linear maps and the stacked weights of experts alike, but no embeddings, head or router. What the weights
    are when the context is left stays, merged. Yields the parameters of the updates.

    Raises:
        ValueError: ``rank`` is not smaller than the sides of every matrix.
    """
    head = head_module(model)
    places = [
        (module, name)
        for module in model.modules()
        if not isinstance(module, (nn.Embedding, Router)) and module is not head
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() >= 2 and not name.endswith("bias")
    ]
    smallest = min((min(getattr(module, name).shape[-2:]) for module, name in places), default=0)
    if rank >= smallest:
        raise ValueError(
            f"rank={rank} is no low rank: the model has a matrix with a side of {smallest}. Lower --rank, or "
            "train all weights (--trainable all)"
        )
    generator = torch.Generator().manual_seed(seed)
    updates: list[LowRank] = []
    try:
        for module, name in places:
            updates.append(LowRank(getattr(module, name), rank, generator))
            parametrize.register_parametrization(module, name, updates[-1])
        yield [parameter for update in updates for parameter in update.parameters()]
    finally:
        for module, name in places[: len(updates)]:
            parametrize.remove_parametrizations(module, name)
