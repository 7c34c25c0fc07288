"""Exact maximum-score assignment of rows to columns under a capacity, with its certificate.

    maximise  sum_te x_te S_te   subject to   sum_e x_te = k,   sum_t x_te <= C,   0 <= x_te <= 1.

The dual has one price per column, b >= 0 (free when E C = T k, for then every column is full):

    minimise  D(b) = sum_t (sum of the k largest entries of S_t - b) + C sum_e b_e.

Prices b and an assignment x prove each other optimal when every row holds a top-k of S_t - b, no column is
over its capacity and every column with a positive price is full: then D(b) equals the objective. So E
numbers are sought, not T E, and three stages find them:

1. **Price ascent** (``sweep.py``). Vectorised float32 sweeps over all rows move every price to its own
   balance point, first on a sample of an eighth of the rows, recursively. On ordinary scores half a unit
   per column is left unplaced after five to ten sweeps. Where sweeps do not get through (columns that
   compete in a chain, rows in tight clusters), the sample is solved exactly first.
2. **Consistent rounding** (``rounding.py``). A row whose k-th and (k+1)-th value of S_t - b differ, v1 >
   v2, takes its top-k; float32 decides that exactly, because rounding is monotone. Tied rows choose in
   float64, the least loaded columns first. Now x fits b, and only some loads are wrong.
3. **Repair** (``repair.py``). Shortest augmenting paths over the columns place the rest in float64, one
   Dijkstra each; x and b fit each other all the way. The graph holds only the rows of smallest gap v1 - v2:
   any other keeps its top-k until two prices have moved apart by its gap. When a path asks for more, the
   graph takes in more rows, at last all; if then there is no path, the forbidden pairs leave no assignment
   at all.

``fitting.py`` is stages 2 and 3 in one compiled call. The answer is exact whatever the prices of stage 1,
which only decide how much is left to repair. ``work`` counts the paths searched: at most one per unit that
stage 2 left unplaced, plus one per enlargement of the graph.

Shapes: T rows, E columns, k choices per row, C capacity, n rows of a subset, G classes of equal rows,
N nodes of the repair graph (E, or E + 1 with unused capacity).
Source: the linear program of arXiv 2508.12801, section 3; the price step is quantile balancing by bisection.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monge.ot.assignment.completion import complete
from monge.ot.assignment.fitting import fit
from monge.ot.assignment.repair import NO_PATH, OUT_OF_WORK
from monge.ot.assignment.rounding import finish, regret
from monge.ot.assignment.solution import STAGES, Solution
from monge.ot.assignment.sweep import ascend

SAMPLED_FROM = 2048  # rows from which prices start on a sample of every STRIDE-th
RESAMPLED_FROM = 128  # rows from which they do where sweeps over all rows do not get through
STRIDE = 8
LARGE = 1e37  # scores are scaled down where float32 could overflow
UNLIMITED = np.iinfo(np.int64).max


class Problem(NamedTuple):
    """Scores with what the stages need of them."""

    score_TE: np.ndarray  # float32 or float64
    narrow_TE: np.ndarray  # the same in float32
    error: float  # the largest difference of the two
    k: int
    capacity: int
    slack: bool  # E C > T k: prices are >= 0 and a priced column is full


class Start(NamedTuple):
    """Prices of stage 1, all float32."""

    price_E: np.ndarray
    width_E: np.ndarray  # of the step to refine them with
    v1_T: np.ndarray  # the k-th and (k+1)-th value of every row
    v2_T: np.ndarray
    unplaced: int


def solve_exact(scores: np.ndarray, k: int, capacity: int, max_work: int | None = None) -> Solution:
    """The assignment of maximum score: k distinct columns per row, at most ``capacity`` rows per column.

    Args:
        scores: (T, E) float32 or float64, C-contiguous, T >= 1, without NaN or +inf. -inf forbids a pair;
            every row allows at least k.
        k: 1 <= k <= E.
        capacity: rows per column; E * capacity >= T * k.
        max_work: bound of the augmenting paths searched in the repair; None: as many as the optimum takes.

    Returns:
        A ``Solution``: "optimal", "infeasible", or "approximate" where ``max_work`` ran out; then the
        assignment is completed greedily and D(b) at the prices reached bounds it. The stage is "trivial" (k
        = E), "prices" (nothing to repair), "repair", or "fallback" where the repair had to take in all
        rows.

    Examples:
        >>> import numpy as np
        >>> solution = solve_exact(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6], [0.1, 0.3]]), 1, 2)
        >>> solution.indices.ravel().tolist(), solution.status, round(solution.objective, 6)
        ([0, 0, 1, 1], 'optimal', 2.6)
    """
    num_rows, num_columns = scores.shape
    price_E, load_E = np.zeros(num_columns), np.zeros(num_columns, np.int64)
    if k == num_columns:
        indices_TK = np.tile(np.arange(num_columns), (num_rows, 1))
        objective, _ = finish(scores, indices_TK, price_E, num_rows, load_E)
        return Solution(indices_TK, price_E, load_E, objective, objective, "optimal", "trivial")

    top = float(scores.max())
    scale = 2.0 ** int(np.frexp(top)[1]) if top > LARGE else 1.0
    problem = _problem(scores if scale == 1.0 else scores / scale, k, capacity)
    start = _prices(problem)
    indices_TK = np.empty((num_rows, k), np.int64)
    limit = UNLIMITED if max_work is None else max_work
    ended, code, work, missed = _fit(problem, start, limit, indices_TK, price_E)
    stage = STAGES[code]
    if ended == OUT_OF_WORK and not _complete(problem, indices_TK, price_E, start.v2_T):
        ended = NO_PATH
    if ended == NO_PATH:
        return Solution.infeasible(num_rows, num_columns, k, "pairs", stage, work)

    objective, unsold = finish(scores, indices_TK, price_E, capacity, load_E)
    if objective == -np.inf:
        return Solution.infeasible(num_rows, num_columns, k, "row", stage, work)
    status, reason = "optimal", ""
    if ended == OUT_OF_WORK:
        missed = regret(problem.score_TE.astype(np.float64), price_E, indices_TK)
        status, reason = "approximate", "work"
    # D(b) minus the objective is what the rows regret and what the columns leave unsold.
    bound = max(objective, objective + scale * (missed + unsold))
    return Solution(indices_TK, price_E * scale, load_E, objective, bound, status, stage, work, reason)


def _problem(score_TE: np.ndarray, k: int, capacity: int) -> Problem:
    slack = score_TE.shape[1] * capacity > score_TE.shape[0] * k
    if score_TE.dtype == np.float32:
        return Problem(score_TE, score_TE, 0.0, k, capacity, slack)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow_TE = score_TE.astype(np.float32)
        difference_TE = np.abs(score_TE - narrow_TE)
    error = float(difference_TE.max(initial=0.0, where=np.isfinite(difference_TE)))
    return Problem(score_TE, narrow_TE, error, k, capacity, slack)


def _prices(problem: Problem) -> Start:
    """Stage 1; on a sample first where there are many rows, or where sweeps do not get through."""
    num_rows, num_columns = problem.narrow_TE.shape
    if num_rows < SAMPLED_FROM:
        start = _ascend(problem, np.zeros(num_columns, np.float32), np.zeros(num_columns, np.float32))
        if start.unplaced <= num_columns or num_rows < RESAMPLED_FROM:
            return start
    return _ascend(problem, *_sample_prices(problem))


def _sample_prices(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Prices, and the width of the step to refine them with, from one row in STRIDE."""
    num_rows, num_columns = problem.narrow_TE.shape
    i = np.arange(num_rows // STRIDE)
    sample_nE = problem.narrow_TE[i * STRIDE + (i * 2654435761 >> 13) % STRIDE]  # in step with no period
    least = -(-len(i) * problem.k // num_columns)
    capacity = max(least, round(len(i) * problem.capacity / num_rows))
    start = _prices(Problem(sample_nE, sample_nE, 0.0, problem.k, capacity, problem.slack))
    if start.unplaced <= num_columns:
        return start.price_E, start.width_E
    # Sweeps do not get through: exact prices of the sample are worth their time.
    indices_nK, price_E = np.empty((len(i), problem.k), np.int64), np.empty(num_columns)
    _fit(_problem(sample_nE, problem.k, capacity), start, UNLIMITED, indices_nK, price_E)
    return price_E.astype(np.float32), start.width_E


def _ascend(problem: Problem, price_E: np.ndarray, width_E: np.ndarray) -> Start:
    """Sweeps over all rows, ``price_E`` and ``width_E`` in place."""
    _, narrow_TE, _, k, capacity, slack = problem
    v1_T, v2_T = np.empty(len(narrow_TE), np.float32), np.empty(len(narrow_TE), np.float32)
    unplaced = ascend(narrow_TE, k, capacity, slack, price_E, width_E, v1_T, v2_T)
    return Start(price_E, width_E, v1_T, v2_T, unplaced)


def _fit(
    problem: Problem, start: Start, limit: int, indices_TK: np.ndarray, price_E: np.ndarray
) -> tuple[int, int, int, float]:
    """Stages 2 and 3: see ``fit``."""
    score_TE, narrow_TE, error, _, capacity, slack = problem
    price, _, v1_T, v2_T, _ = start
    return fit(score_TE, narrow_TE, error, capacity, slack, price, v1_T, v2_T, limit, indices_TK, price_E)


def _complete(problem: Problem, indices_TK: np.ndarray, price_E: np.ndarray, v2_T: np.ndarray) -> bool:
    """Take the least wanted units off overloaded columns and place them where there is room, if possible."""
    load_E = np.bincount(indices_TK.ravel(), minlength=len(price_E))
    value_TK = np.take_along_axis(problem.score_TE, indices_TK, 1) - price_E[indices_TK]
    for e in np.flatnonzero(load_E > problem.capacity):
        rows, slots = np.nonzero(indices_TK == e)
        margin = value_TK[rows, slots] - v2_T[rows]
        least = np.argsort(margin, kind="stable")[: load_E[e] - problem.capacity]
        indices_TK[rows[least], slots[least]] = -1
    load_E = np.minimum(load_E, problem.capacity)
    return bool(complete(problem.score_TE.astype(np.float64), indices_TK, load_E, problem.capacity))
