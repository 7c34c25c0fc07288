"""How many slots every expert received, layer by layer: all that training needs to know about routing.

`monge.watch` tells more, and costs more; this stays on in every training step.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from monge.lab.models import moe_layers


class LoadCounter(AbstractContextManager["LoadCounter"]):
    """Counts slots while entered. Without MoE layers (the dense baseline) every result has L = 0 rows."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(moe_layers(model).values())
        self._hooks: list[Any] = []
        self._loads: list[Tensor | None] = [None] * len(self._layers)

    def __enter__(self) -> LoadCounter:
        self._hooks = [
            layer.router.register_forward_hook(
                lambda router, args, routing, i=i: self._count(i, routing.loads)
            )
            for i, layer in enumerate(self._layers)
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> Tensor:
        """(L, E) float64 on the CPU: slots since the last call."""
        loads = [load for load in self._loads if load is not None]
        self._loads = [None] * len(self._layers)
        return torch.stack(loads).cpu().double() if loads else torch.zeros(0, 0, dtype=torch.float64)

    def _count(self, index: int, loads_E: Tensor) -> None:
        before = self._loads[index]
        self._loads[index] = loads_E if before is None else before + loads_E


def max_violation(loads_LE: Tensor) -> Tensor:
    """(L,) max load / mean load - 1 of each layer."""
    if not loads_LE.numel():
        return loads_LE.new_zeros(0)
    return loads_LE.amax(dim=1) / loads_LE.mean(dim=1) - 1
