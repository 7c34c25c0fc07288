"""What a router decided: the one type that flows from routing to dispatch, combine and monitoring.

Shapes: T tokens (all leading dimensions flattened), K slots per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of every token and the weights they are summed with.

    Attributes:
        indices: (T, K) int64, the chosen experts. -1 marks an empty slot, whose weight is 0.
            K is ``top_k``; expert choice, where a token may be taken by any number of experts, has K = E.
        weights: (T, K), at least float32, the gates.
        num_experts: E.
        logits: (T, E) router logits before any price, bias or noise.
        aux_loss: scalar auxiliary loss of this forward, already multiplied by its coefficient, or None.
        prices: (E,) what was subtracted from the scores to choose, or None.
        mask: (T,) True where a token is valid, or None when all are. Invalid tokens have only empty slots.

    Examples:
        >>> import torch
        >>> from monge import Routing
        >>> r = Routing(torch.tensor([[0, 1], [0, 2]]), torch.full((2, 2), 0.5), 4, torch.zeros(2, 4))
        >>> r.loads.tolist(), round(r.max_violation, 2)
        ([2, 1, 1, 0], 1.0)
    """

    indices: Tensor
    weights: Tensor
    num_experts: int
    logits: Tensor
    aux_loss: Tensor | None = None
    prices: Tensor | None = None
    mask: Tensor | None = None

    @property
    def loads(self) -> Tensor:
        """(E,) int64, how many slots each expert received."""
        return expert_loads(self.indices, self.num_experts)

    @property
    def max_violation(self) -> float:
        """Largest load over the mean load, minus one: 0 is perfect balance, E - 1 is one expert taking all.

        Zero when no slot is filled. Synchronises with the device.
        """
        loads = self.loads
        total = int(loads.sum())
        return float(loads.max()) * self.num_experts / total - 1.0 if total else 0.0


def expert_loads(indices_TK: Tensor, num_experts: int) -> Tensor:
    """(E,) int64, the number of slots of ``indices_TK`` on each expert; empty slots (-1) are not counted.

    Fixed shapes and no host synchronisation, so it traces under ``torch.compile``.
    """
    # Slot 0 of the E + 1 bins collects the empty slots.
    loads = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices_TK.device)
    flat = indices_TK.flatten() + 1
    return loads.scatter_add_(0, flat, torch.ones_like(flat))[1:]
