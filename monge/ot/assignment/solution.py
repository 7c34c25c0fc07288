"""What the assignment solvers return: ``Solution`` of one problem, ``Assignment`` of a call of
``monge.ot.assign``.

Shapes: T rows, E columns, k choices per row; ``...`` leading batch dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

STATUSES = ("optimal", "approximate", "infeasible")
STAGES = ("none", "trivial", "prices", "repair", "fallback", "greedy", "approximate")
REASONS = {
    "": "",
    "steps": "the method takes a fixed number of steps: `gap` bounds what is missing",
    "work": "the exact repair reached its bound of work: raise `max_work`, or use the answer with its `gap`",
    "slots": "the columns offer fewer slots than the rows need: raise `capacity`, or `capacity_factor` to 1",
    "row": "a row has fewer than k finite scores: forbid fewer pairs (-inf) in it, lower `k` or mask the row",
    "pairs": "the forbidden pairs (-inf) leave no complete assignment: forbid fewer, or raise `capacity`",
    "values": "scores hold NaN or +inf in a valid row: clean or mask those rows",
}
REASON_CODES = {name: code for code, name in enumerate(REASONS)}


@dataclass(frozen=True, slots=True)
class Solution:
    """One solved problem, on the CPU, without masked rows.

    Attributes:
        indices: (T, k) int64 by falling score; all -1 when infeasible.
        prices: (E,) float64 column prices of the certificate; non-negative unless E * capacity = T * k.
        loads: (E,) int64 rows per column.
        objective: sum of the chosen scores in float64; -inf when infeasible.
        upper_bound: ``sum_t (sum of the k largest of S_t - b) + capacity * sum(b)`` at these prices b.
        status: one of ``STATUSES``.
        stage: the stage the solver ended in, one of ``STAGES``.
        work: deterministic count of the work done after the price stage (comparable with ``max_work``).
        reason: why the status is not "optimal", a key of ``REASONS``; "" when it is.
    """

    indices: np.ndarray
    prices: np.ndarray
    loads: np.ndarray
    objective: float
    upper_bound: float
    status: str
    stage: str
    work: int = 0
    reason: str = ""

    @classmethod
    def infeasible(
        cls, rows: int, columns: int, k: int, reason: str, stage: str = "none", work: int = 0
    ) -> Solution:
        """The empty answer to a problem that has none."""
        indices = np.full((rows, k), -1, dtype=np.int64)
        prices, loads = np.zeros(columns), np.zeros(columns, np.int64)
        return cls(indices, prices, loads, -np.inf, -np.inf, "infeasible", stage, work, reason)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The answer of ``monge.ot.assign``: tensors on the device of the scores, with the scores' batch
    dimensions.

    Reading ``status``, ``stage``, ``reason``, ``work`` or ``capacity`` synchronises with the device; each is
    one value for (T, E) scores and nested lists for (..., T, E).

    Attributes:
        indices: (..., T, k) int64 by falling score, ties by lower index; -1 in masked rows and when
            infeasible.
        prices: (..., E) float64. With them ``upper_bound`` is a certificate: the dual value
            ``sum_t (sum of the k largest of S_t - b) + capacity * sum(b)``. Non-negative where a column
            may stay below its capacity. Convert before subtracting them from float32 scores.
        loads: (..., E) int64, rows per column, never above ``capacity``.
        objective: (...) float64, the sum of the chosen scores; -inf when infeasible.
        upper_bound: (...) float64, no assignment can exceed it; -inf when infeasible.
        report: (..., 5) int64, the codes behind the properties below.
    """

    indices: Tensor
    prices: Tensor
    loads: Tensor
    objective: Tensor
    upper_bound: Tensor
    report: Tensor

    @property
    def gap(self) -> Tensor:
        """(...) float64, ``(upper_bound - objective) / max(1, |upper_bound|)``; +inf when infeasible."""
        gap = (self.upper_bound - self.objective) / self.upper_bound.abs().clamp(min=1.0)
        return torch.where(self.objective == -torch.inf, torch.inf, gap)

    @property
    def status(self) -> Any:
        """``"optimal"``, ``"approximate"`` or ``"infeasible"``."""
        return _lookup(self.report[..., 0].tolist(), STATUSES)

    @property
    def stage(self) -> Any:
        """The stage in which the solver ended, one of ``STAGES``."""
        return _lookup(self.report[..., 1].tolist(), STAGES)

    @property
    def reason(self) -> Any:
        """Why the status is not ``"optimal"``, and the remedy; empty otherwise."""
        return _lookup(self.report[..., 2].tolist(), tuple(REASONS.values()))

    @property
    def work(self) -> Any:
        """Work of the exact repair, in the units of ``max_work``."""
        return self.report[..., 3].tolist()

    @property
    def capacity(self) -> Any:
        """The capacity of every column that was used."""
        return self.report[..., 4].tolist()


def _lookup(codes: Any, table: tuple[str, ...]) -> Any:
    return [_lookup(code, table) for code in codes] if isinstance(codes, list) else table[codes]
