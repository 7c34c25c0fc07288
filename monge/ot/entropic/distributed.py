"""Sums and maxima over the rows of every rank: the only thing that a distributed solve adds to a local one.

The rows of the score matrix are spread over the ranks of a process group and the columns are shared. The
solver asks for totals over all rows; here is where they cross the ranks. A forward sends E-sized messages
only, the implicit backward one E x E matrix more. Every decision (form, stop) is taken on reduced values, so
that all ranks take it alike.

Shapes: B problems, E columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The ranks that hold the rows; ``RowGroup(None)`` is this process alone, where nothing is exchanged."""

    group: dist.ProcessGroup | None = None

    @property
    def is_local(self) -> bool:
        return self.group is None

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the ranks, in a tensor of its own when anything was exchanged."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum of ``values`` over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is None:
            return values
        reduced = values.detach().clone().contiguous()
        dist.all_reduce(reduced, op=op, group=self.group)
        return reduced


LOCAL = RowGroup(None)
