"""The methods that run on the CPU, problem by problem, and the operator that ``torch.compile`` sees of them.

Shapes: T rows, E columns, k choices per row, B instances (all leading dimensions flattened), C capacity.
"""

from __future__ import annotations

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
    scores_BTE: Tensor,
    mask_BT: Tensor | None,
    k: int,
    capacity: int | None,
    numerator: int,
    denominator: int,
    max_work: int | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``Assignment``, in its order, for every problem; arguments as checked by ``assign``.

    Raises:
        ValueError: NaN or +inf in a row that is not masked.
    """
    device = scores_BTE.device
    scores = scores_BTE.cpu().contiguous().numpy()
    mask = None if mask_BT is None else mask_BT.cpu().numpy()
    B, T, E = scores.shape

    solved: dict[int, tuple[Solution, int]] = {}

    def solve(b: int) -> None:
        rows_TE = scores[b] if mask is None else scores[b][mask[b]]
        C = capacity_of(len(rows_TE), E, k, capacity, (numerator, denominator))
        solved[b] = _solve(rows_TE, k, C, max_work, method), C

    try:
        run_all(solve, range(B))
    except _BadValues:
        raise ValueError(bad_values_message(scores_BTE, mask_BT)) from None

    if mask is None and B == 1:
        indices = solved[0][0].indices[None]
    else:
        indices = np.full((B, T, k), -1, dtype=np.int64)
        for b in range(B):
            indices[b, slice(None) if mask is None else mask[b]] = solved[b][0].indices
    prices = np.empty((B, E))
    loads = np.empty((B, E), dtype=np.int64)
    values = np.empty((2, B))
    report = np.empty((B, 5), dtype=np.int64)
    for b in range(B):
        s, C = solved[b]
        prices[b] = s.prices
        loads[b] = 0 if s.status == "infeasible" else np.bincount(s.indices.ravel(), minlength=E)
        values[:, b] = s.objective, s.upper_bound
        report[b] = STATUSES.index(s.status), STAGES.index(s.stage), REASON_CODES[s.reason], s.work, C
    answer = (indices, prices, loads, values[0], values[1], report)
    tensors = tuple(torch.from_numpy(x) for x in answer)
    return tensors if device.type == "cpu" else tuple(x.to(device) for x in tensors)  # type: ignore[return-value]


@torch.library.custom_op("monge::assign", mutates_args=())
def _operator(
    scores_BTE: Tensor,
    mask_BT: Tensor | None,
    k: int,
    capacity: int | None,
    numerator: int,
    denominator: int,
    max_work: int | None,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    answer = solve_on_cpu(scores_BTE, mask_BT, k, capacity, numerator, denominator, max_work, method)
    return tuple(x.clone() for x in answer)  # type: ignore[return-value]  # outputs may share no memory


@_operator.register_fake
def _(scores_BTE, mask_BT, k, capacity, numerator, denominator, max_work, method):  # type: ignore[no-untyped-def]
    B, T, E = scores_BTE.shape
    return (
        scores_BTE.new_empty((B, T, k), dtype=torch.int64),
        scores_BTE.new_empty((B, E), dtype=torch.float64),
        scores_BTE.new_empty((B, E), dtype=torch.int64),
        scores_BTE.new_empty((B,), dtype=torch.float64),
        scores_BTE.new_empty((B,), dtype=torch.float64),
        scores_BTE.new_empty((B, 5), dtype=torch.int64),
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
        return Solution(np.empty((0, k), np.int64), np.zeros(E), 0.0, 0.0, "optimal", "trivial")
    if not rows_TE.max() < np.inf:  # NaN too
        raise _BadValues
    if E * capacity < T * k:
        return Solution.infeasible(T, E, k, "slots")
    if rows_TE.min() == -np.inf and ((rows_TE > -np.inf).sum(-1) < k).any():
        return Solution.infeasible(T, E, k, "row")
    return SOLVERS[method](rows_TE, k, capacity, max_work)


def bad_values_message(scores_BTE: Tensor, mask_BT: Tensor | None) -> str:
    """What ``assign`` says of NaN and +inf in valid rows; empty where there are none."""
    bad_BTE = scores_BTE.isnan() | (scores_BTE == torch.inf)
    if mask_BT is not None:
        bad_BTE &= mask_BT.unsqueeze(-1)
    count = int(bad_BTE.sum())
    if not count:
        return ""
    b, t, e = (int(x) for x in bad_BTE.nonzero()[0])
    return (
        f"scores of valid rows must be finite or -inf: {count} entries are NaN or +inf, the first "
        f"{float(scores_BTE[b, t, e])} in problem {b}, row {t}, column {e}; clean them, or mask those rows"
    )
