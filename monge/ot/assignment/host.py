"""The methods that run on the CPU, problem by problem, and the operator that ``torch.compile`` sees of them.

Shapes: T rows, E columns, k choices per row, B instances (all leading dimensions flattened), C capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from monge.ot.assignment.exact import solve_exact
from monge.ot.assignment.greedy import solve_greedy
from monge.ot.assignment.solution import REASON_CODES, STAGES, STATUSES, Solution
from monge.ot.threads import run_all

SOLVERS: dict[str, Callable[..., Solution]] = {"exact": solve_exact, "greedy": solve_greedy}


def solve_on_cpu(
    scores: Tensor,
    mask: Tensor | None,
    k: int,
    capacity: int | None,
    numerator: int,
    denominator: int,
    max_work: int | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``Assignment``, in its order, for (..., T, E) scores; arguments as checked by ``assign``.

    Raises:
        ValueError: NaN or +inf in a row that is not masked.
    """
    batch, (T, E) = scores.shape[:-2], scores.shape[-2:]
    B = math.prod(batch)
    scores_BTE = np.ascontiguousarray(scores.cpu().numpy()).reshape(B, T, E)
    mask_BT = None if mask is None else mask.cpu().numpy().reshape(B, T)
    indices_BTk, report_B5 = np.empty((B, T, k), np.int64), np.empty((B, 5), np.int64)
    prices_BE, loads_BE = np.empty((B, E)), np.empty((B, E), np.int64)
    objective_B, bound_B = np.empty(B), np.empty(B)

    def solve(b: int) -> None:
        rows_TE = scores_BTE[b] if mask_BT is None else scores_BTE[b][mask_BT[b]]
        C = capacity_of(len(rows_TE), E, k, capacity, (numerator, denominator))
        s = _solve(rows_TE, k, C, max_work, method)
        if mask_BT is None:
            indices_BTk[b] = s.indices
        else:
            indices_BTk[b] = -1
            indices_BTk[b, mask_BT[b]] = s.indices
        prices_BE[b], loads_BE[b], objective_B[b], bound_B[b] = s.prices, s.loads, s.objective, s.upper_bound
        report_B5[b] = STATUSES.index(s.status), STAGES.index(s.stage), REASON_CODES[s.reason], s.work, C

    try:
        run_all(solve, range(B))
    except _BadValues:
        raise ValueError(bad_values_message(scores, mask)) from None
    answer = (indices_BTk, prices_BE, loads_BE, objective_B, bound_B, report_B5)
    tensors = tuple(torch.from_numpy(x.reshape(batch + x.shape[1:])) for x in answer)
    on_cpu = scores.device.type == "cpu"
    return tensors if on_cpu else tuple(x.to(scores.device) for x in tensors)  # type: ignore[return-value]


# What ``torch.compile`` sees. Called by hand, the operator costs as much as a small problem.
operator = torch.library.custom_op("monge::assign", solve_on_cpu, mutates_args=())


@operator.register_fake
def _(scores, mask, k, capacity, numerator, denominator, max_work, method):  # type: ignore[no-untyped-def]
    *batch, T, E = scores.shape
    return (
        scores.new_empty((*batch, T, k), dtype=torch.int64),
        scores.new_empty((*batch, E), dtype=torch.float64),
        scores.new_empty((*batch, E), dtype=torch.int64),
        scores.new_empty(batch, dtype=torch.float64),
        scores.new_empty(batch, dtype=torch.float64),
        scores.new_empty((*batch, 5), dtype=torch.int64),
    )


def capacity_of(rows: int, E: int, k: int, capacity: int | None, factor: tuple[int, int]) -> int:
    """The capacity in integer arithmetic; no column can have more rows than there are."""
    numerator, denominator = factor
    return min(rows, -(-rows * k * numerator // (E * denominator)) if capacity is None else capacity)


class _BadValues(Exception):
    """NaN or +inf where a row counts; the caller knows what to say of them."""


def _solve(rows_TE: np.ndarray, k: int, capacity: int, max_work: int | None, method: str) -> Solution:
    """The checks that need no solver, then the solver."""
    T, E = rows_TE.shape
    if T == 0:
        indices_TK, price_E, load_E = np.empty((0, k), np.int64), np.zeros(E), np.zeros(E, np.int64)
        return Solution(indices_TK, price_E, load_E, 0.0, 0.0, "optimal", "trivial")
    if not rows_TE.max() < np.inf:  # NaN too
        raise _BadValues
    if E * capacity < T * k:
        return Solution.infeasible(T, E, k, "slots")
    if rows_TE.min() == -np.inf and ((rows_TE > -np.inf).sum(-1) < k).any():
        return Solution.infeasible(T, E, k, "row")
    return SOLVERS[method](rows_TE, k, capacity, max_work)


def bad_values_message(scores: Tensor, mask: Tensor | None) -> str:
    """What ``assign`` says of NaN and +inf in valid rows; empty where there are none."""
    bad = scores.isnan() | (scores == torch.inf)
    if mask is not None:
        bad &= mask.unsqueeze(-1)
    count = int(bad.sum())
    if not count:
        return ""
    *batch, t, e = (int(x) for x in bad.nonzero()[0])
    problem = f"problem {batch[0] if len(batch) == 1 else tuple(batch)}, " if batch else ""
    return (
        f"scores of valid rows must be finite or -inf: {count} entries are NaN or +inf, the first "
        f"{float(scores[(*batch, t, e)])} in {problem}row {t}, column {e}; clean them, or mask those rows"
    )
