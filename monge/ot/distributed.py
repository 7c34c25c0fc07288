"""Sums, maxima and order statistics over the rows of all ranks: what a distributed solve adds to a local one.

The rows of the score matrix are spread over the ranks of a process group and the columns are shared. The
solvers ask for totals over all rows; here is where they cross the ranks. A forward sends messages of O(E)
numbers only, the implicit backward one E x E matrix more. Every decision (form, stop) is taken on reduced
values, so that all ranks take it alike.

Shapes: B problems, T rows, E columns, R ranks, D digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DIGIT = 4  # bits that a round of `nth_largest` settles, with 2^4 - 1 counts a column


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The ranks that hold the rows; ``RowGroup(None)`` is this process alone, where nothing is exchanged.

    A copy of a module shares its group; what is pickled does not go to another process with it.
    """

    group: dist.ProcessGroup | None = None

    @property
    def is_local(self) -> bool:
        return self.group is None

    @property
    def size(self) -> int:
        """R, the number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The place of this process among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the ranks, in a tensor of its own when anything was exchanged."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum of ``values`` over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor) -> Tensor:
        """(R, ...): ``values`` of every rank, in the order of the ranks."""
        if self.group is None:
            return values.detach()[None]
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, values.detach().contiguous(), group=self.group)
        return torch.stack(parts)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is None:
            return values
        reduced = values.detach().clone().contiguous()
        dist.all_reduce(reduced, op=op, group=self.group)
        return reduced

    def __deepcopy__(self, memo: dict[int, Any]) -> RowGroup:
        return self

    def __reduce__(self) -> tuple[type[RowGroup], tuple[()]]:
        return RowGroup, ()


LOCAL = RowGroup(None)


def nth_largest(values_TE: Tensor, n_1: Tensor, rows: RowGroup, *, midway: bool = False) -> Tensor:
    """(..., E), the (n+1)-th largest of every column over the rows of all ranks, or the middle to the n-th.

    Exact: a radix search settles four bits of the answer a round, on int32 counts of 15 candidates a column.
    That is 8 messages of 15 E numbers for float32, 16 for float64, and two of E for ``midway``. A column with
    at most n values has -inf.

    Args:
        values_TE: (..., T, E), float32 or float64, any T on each rank; no NaN.
        n_1: (..., 1) or (..., E) int64, the same on all ranks.
        midway: the mean of the n-th and the (n+1)-th largest; where one of them is infinite, the other.
    """
    keys_ET = _ordered_bits(values_TE.mT.contiguous())
    sorted_ET = keys_ET.sort(dim=-1).values
    T, bits = keys_ET.shape[-1], 8 * keys_ET.element_size()
    digits_D = torch.arange(1, 1 << _DIGIT, device=keys_ET.device)
    lowest = -(1 << (bits - 1))
    base_E1 = torch.full((*keys_ET.shape[:-1], 1), lowest, dtype=torch.int64, device=keys_ET.device)
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        candidates_ED = base_E1 + (digits_D << shift)
        below_ED = torch.searchsorted(sorted_ET, candidates_ED.to(keys_ET.dtype))
        enough_ED = rows.sum((T - below_ED).to(torch.int32)) > n_1.unsqueeze(-1)
        base_E1 = base_E1 + (enough_ED.sum(-1, keepdim=True) << shift)
    low_E = _from_ordered_bits(base_E1.squeeze(-1).to(keys_ET.dtype), values_TE.dtype)
    low_E = torch.where(low_E.isnan(), -torch.inf, low_E)  # nobody had as many: the lowest key of all
    if not midway:
        return low_E
    # The n-th is the smallest value above the (n+1)-th, unless the two are equal.
    above_TE = values_TE > low_E.unsqueeze(-2)
    none_1E = torch.full_like(low_E, -torch.inf).unsqueeze(-2)  # a rank may hold no rows
    negated_E = torch.cat([torch.where(above_TE, -values_TE, -torch.inf), none_1E], -2).amax(-2)
    high_E = -rows.max(negated_E)
    high_E = torch.where(rows.sum(above_TE.sum(-2)) == n_1, high_E, low_E)
    middle_E = torch.where(high_E.isfinite(), 0.5 * (low_E + high_E), low_E)
    return torch.where(low_E.isfinite(), middle_E, high_E)


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of ``values``: the bits, of negative floats all but the sign flipped."""
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _from_ordered_bits(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys).view(dtype)
