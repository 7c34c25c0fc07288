"""From tokens to experts and back: sort slots by expert, sum those of a token, drop what exceeds a capacity.

All of it is deterministic: the sort is stable (equal experts stay in token order), and the way back is a
gather and a sum in slot order instead of an atomic scatter.

Shapes: T tokens, K slots per token, E experts, H width, N filled slots, R rows (N, or T K if N is unread).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monge.moe.cpu_kernels import sort_by_expert
from monge.routing.types import Routing, expert_loads


@dataclass(frozen=True)
class Slots:
    """The filled slots, grouped by expert.

    Attributes:
        starts_E1: (E + 1,) int64, expert e has rows starts[e]..starts[e + 1] - 1.
        tokens_R: (R,) int64, the token of each sorted slot; expert 0's slots first, empty slots last.
        order_R: (R,) int64, the same slots as positions in the flattened (T, K).
        rows_TK: (T, K) int64, where slot (t, k) is in the sorted order; R for an empty slot.
    """

    starts_E1: Tensor
    tokens_R: Tensor
    order_R: Tensor
    rows_TK: Tensor

    @property
    def counts_E(self) -> Tensor:
        """(E,) int64, slots of each expert."""
        return self.starts_E1.diff()


def sort_slots(indices_TK: Tensor, num_experts: int, *, padded: bool = False) -> Slots:
    """Group the slots by expert. Reads N from the device unless ``padded``, where R = T K."""
    if indices_TK.device.type == "cpu":
        return _sort_on_cpu(indices_TK, num_experts, padded)
    T, K = indices_TK.shape
    flat, device = indices_TK.flatten(), indices_TK.device
    # short keys sort several times faster than int64 ones; unsigned, an empty slot's -1 comes last
    short = torch.uint8 if num_experts < 2**8 else torch.int16 if num_experts < 2**15 else torch.int64
    keys = flat.to(short) if short == torch.uint8 else flat.masked_fill(flat < 0, num_experts).to(short)
    ascending, order = torch.sort(keys, stable=True)
    starts_E1 = torch.searchsorted(ascending, torch.arange(num_experts + 1, dtype=short, device=device))
    rows = torch.empty_like(order)
    rows[order] = torch.arange(T * K, device=device)
    R = T * K if padded else int(starts_E1[-1])
    rows = rows.masked_fill_(flat < 0, R)
    order_R = order[:R]
    return Slots(starts_E1, order_R // max(K, 1), order_R, rows.view(T, K))


def _sort_on_cpu(indices_TK: Tensor, num_experts: int, padded: bool) -> Slots:
    """The same by one compiled counting sort: microseconds, which matter to a few tokens."""
    arrays = sort_by_expert(indices_TK.numpy(), num_experts, padded)
    return Slots(*(torch.from_numpy(array) for array in arrays))


def combine(values_RH: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """(T, H): out_t = sum_k weights_tk * values[rows_tk], in slot order, in the dtype of ``values``.

    ``values`` has one more row than there are slots: the last, zero, stands for the empty ones.
    """
    if weights_TK is not None:
        weights_TK = weights_TK.to(values_RH.dtype)
    return F.embedding_bag(rows_TK, values_RH, mode="sum", per_sample_weights=weights_TK)


def capacity_of(num_slots: Tensor | int, num_experts: int, capacity_factor: float) -> Any:
    """C = ceil(capacity_factor * num_slots / num_experts), the most slots an expert takes.

    In integers, the factor being the fraction nearest to it with a denominator up to 10^6, so that 1.1 times
    10 slots is 11 and not, as in floating point, a little more and hence 12. ``num_slots`` may be an int64
    tensor: no synchronisation.
    """
    factor = Fraction(capacity_factor).limit_denominator(10**6)
    return -(-num_slots * factor.numerator // (num_experts * factor.denominator))


def apply_capacity(routing: Routing, capacity: Tensor | int) -> Routing:
    """Keep, for every expert, the ``capacity`` slots of largest weight; empty the others.

    Among equal weights the earlier token (then the earlier slot) stays. Weights are not renormalised: a
    dropped slot contributes zero, and a token that loses all its slots gets a zero output. Fixed shapes, no
    synchronisation.

    Examples:
        >>> r = Routing(torch.tensor([[0], [0], [0], [1]]), torch.tensor([[0.2], [0.9], [0.9], [0.1]]), 2,
        ...             torch.zeros(4, 2))
        >>> apply_capacity(r, 1).indices.flatten().tolist()
        [-1, 0, -1, 1]
    """
    T, K = routing.indices.shape
    E = routing.num_experts
    flat = routing.indices.flatten()
    keys = torch.where(flat < 0, E, flat)
    with torch.no_grad():
        # two stable sorts: by falling weight, then by expert
        by_weight = torch.argsort(routing.weights.detach().flatten(), descending=True, stable=True)
        order = by_weight[torch.argsort(keys[by_weight], stable=True)]
        counts_E = expert_loads(routing.indices, E)
        starts = F.pad(counts_E.cumsum(0), (1, 0))  # (E + 1,), the last one begins the empty slots
        rank = torch.arange(T * K, device=flat.device) - starts[keys[order]]
        drop = torch.empty_like(flat, dtype=torch.bool)
        drop[order] = rank >= capacity
        drop_TK = drop.view(T, K)
    return replace(
        routing,
        indices=routing.indices.masked_fill(drop_TK, -1),
        weights=routing.weights.masked_fill(drop_TK, 0.0),
    )
