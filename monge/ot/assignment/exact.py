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

The answer is exact whatever the prices of stage 1, which only decide how much is left to repair. ``work``
counts the paths searched: at most one per unit that stage 2 left unplaced, plus one per enlargement of the
graph.

Shapes: T rows, E columns, k choices per row, C capacity, n rows of a subset, G classes of equal rows,
N nodes of the repair graph (E, or E + 1 with unused capacity).
Source: the linear program of arXiv 2508.12801, section 3; the price step is quantile balancing by bisection.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monge.ot.assignment import repair, rounding, sweep
from monge.ot.assignment.completion import complete
from monge.ot.assignment.solution import Solution

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


class Fit(NamedTuple):
    """An assignment in which every row holds a top-k of S_t - b."""

    indices_TK: np.ndarray
    price_E: np.ndarray
    regret: float  # how far the rows are from that, summed: rounding only
    ended: int  # repair.DONE, NO_PATH or OUT_OF_WORK
    stage: str
    work: int


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
    if k == num_columns:
        indices_TK = np.tile(np.arange(num_columns), (num_rows, 1))
        objective = rounding.finish(scores, indices_TK)
        return Solution(indices_TK, np.zeros(num_columns), objective, objective, "optimal", "trivial")

    top = float(scores.max())
    scale = 2.0 ** int(np.frexp(top)[1]) if top > LARGE else 1.0
    problem = _problem(scores if scale == 1.0 else scores / scale, k, capacity)
    price_E, _, v1_T, v2_T, _ = _prices(problem)
    fit = _fit(problem, price_E, v1_T, v2_T, UNLIMITED if max_work is None else max_work)
    indices_TK, ended = fit.indices_TK, fit.ended
    if ended == repair.OUT_OF_WORK and not _complete(problem, indices_TK, fit.price_E, v2_T):
        ended = repair.NO_PATH
    if ended == repair.NO_PATH:
        return Solution.infeasible(num_rows, num_columns, k, "pairs", fit.stage, fit.work)

    objective, price_E = rounding.finish(scores, indices_TK), fit.price_E * scale
    if objective == -np.inf:
        return Solution.infeasible(num_rows, num_columns, k, "row", fit.stage, fit.work)
    if ended == repair.OUT_OF_WORK:
        regret = rounding.regret(scores.astype(np.float64), price_E, indices_TK)
        status, reason = "approximate", "work"
    else:
        regret, status, reason = scale * fit.regret, "optimal", ""
    # D(b) minus the objective is what the rows regret and what the columns leave unsold.
    unsold_E = capacity - np.bincount(indices_TK.ravel(), minlength=num_columns)
    bound = max(objective, objective + regret + float(price_E @ unsold_E))
    return Solution(indices_TK, price_E, objective, bound, status, fit.stage, fit.work, reason)


def _problem(score_TE: np.ndarray, k: int, capacity: int) -> Problem:
    slack = score_TE.shape[1] * capacity > score_TE.shape[0] * k
    if score_TE.dtype == np.float32:
        return Problem(score_TE, score_TE, 0.0, k, capacity, slack)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow_TE = score_TE.astype(np.float32)
        difference_TE = np.abs(score_TE - narrow_TE)
    error = float(difference_TE.max(initial=0.0, where=np.isfinite(difference_TE)))
    return Problem(score_TE, narrow_TE, error, k, capacity, slack)


def _prices(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Stage 1: prices, the width of the step to refine them with, v1 and v2 of every row, units unplaced."""
    num_rows, num_columns = problem.narrow_TE.shape
    spread = _spread(problem.narrow_TE)
    if num_rows >= SAMPLED_FROM:
        price_E, width_E = _sample_prices(problem)
        width_E = np.maximum(width_E, np.float32(1e-6 * spread))
        return price_E, width_E, *_ascend(problem, price_E, width_E)
    price_E, width_E = np.zeros(num_columns, np.float32), np.full(num_columns, spread, np.float32)
    v1_T, v2_T, unplaced = _ascend(problem, price_E, width_E)
    if unplaced > num_columns and num_rows >= RESAMPLED_FROM:
        price_E, width_E = _sample_prices(problem)
        v1_T, v2_T, unplaced = _ascend(problem, price_E, width_E)
    return price_E, width_E, v1_T, v2_T, unplaced


def _sample_prices(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Prices, and the width of the step to refine them with, from one row in STRIDE."""
    num_rows, num_columns = problem.narrow_TE.shape
    i = np.arange(num_rows // STRIDE)
    sample_nE = problem.narrow_TE[i * STRIDE + (i * 2654435761 >> 13) % STRIDE]  # in step with no period
    least = -(-len(i) * problem.k // num_columns)
    capacity = max(least, round(len(i) * problem.capacity / num_rows))
    sample = Problem(sample_nE, sample_nE, 0.0, problem.k, capacity, problem.slack)
    price_E, width_E, v1_n, v2_n, unplaced = _prices(sample)
    if unplaced > num_columns:
        # Sweeps do not get through: exact prices of the sample are worth their time.
        fit = _fit(_problem(sample_nE, problem.k, capacity), price_E, v1_n, v2_n, UNLIMITED)
        price_E = fit.price_E.astype(np.float32)
    return price_E, width_E


def _spread(narrow_TE: np.ndarray) -> float:
    """A quarter of the range of the scores, without the lowest twentieth, which may stand for "never"."""
    some = narrow_TE.ravel()[:: max(1, narrow_TE.size // 512)]
    some = np.sort(some[some > -np.inf])
    return max(0.25 * (float(some[-1]) - float(some[len(some) // 20])), 1e-30) if len(some) else 1.0


def _ascend(problem: Problem, price_E: np.ndarray, width_E: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Sweeps over all rows, ``price_E`` and ``width_E`` in place: v1 and v2 of every row, units unplaced."""
    _, _, _, k, capacity, slack = problem
    num_rows, num_columns = problem.narrow_TE.shape
    v1_T, v2_T = np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
    tiles, enough = sweep.pack(problem.narrow_TE), num_columns // 2
    unplaced = sweep.ascend(tiles, num_rows, k, capacity, slack, enough, price_E, width_E, v1_T, v2_T)
    return v1_T, v2_T, unplaced


def _fit(problem: Problem, start_E: np.ndarray, v1_T: np.ndarray, v2_T: np.ndarray, limit: int) -> Fit:
    """Stages 2 and 3: an assignment that fits the prices ``start_E``, repaired."""
    num_rows, num_columns = problem.score_TE.shape
    slots, k, slack = num_columns * problem.capacity, problem.k, problem.slack
    indices_TK, gap_T, load_E = _round(problem, start_E, v1_T, v2_T)

    price_N, excess_N = np.zeros(num_columns + slack), np.zeros(num_columns + slack, np.int64)
    price_N[:num_columns] = start_E
    free_E = np.zeros(num_columns, np.int64)
    if slack:
        # Columns without a price keep their room as free slots; the others have to fill up.
        free_E[start_E == 0] = np.maximum(problem.capacity - load_E[start_E == 0], 0)
        excess_N[-1] = slots - num_rows * k - free_E.sum()
    excess_N[:num_columns] = load_E + free_E - problem.capacity
    unplaced = int(excess_N[excess_N > 0].sum())

    start_N, size = price_N.copy(), 4 * (unplaced + num_columns) + 16
    stage, ended, work, regret = "prices", repair.DONE, 0, 0.0
    while unplaced:
        stage = "repair" if size < num_rows or stage == "prices" else "fallback"
        rows, cutoff = _smallest(gap_T, size)
        score_nE = problem.score_TE[rows].astype(np.float64)
        class_n, first_G, size_G = _classes(score_nE, grouped=unplaced > num_columns)
        held_nK = indices_TK[rows]
        state = held_nK, price_N, start_N, free_E, excess_N
        ended, work, reach = repair.repair(score_nE[first_G], class_n, size_G, *state, cutoff, work, limit)
        indices_TK[rows] = held_nK
        if ended in (repair.DONE, repair.OUT_OF_WORK) or len(rows) == num_rows:
            regret = rounding.regret(score_nE, price_N[:num_columns], held_nK)
            break
        size = min(4 * size, max(2 * size, int(np.count_nonzero(gap_T <= 1.5 * reach))))
    price_E = price_N[:num_columns] - (price_N[-1] if slack else price_N.min())
    return Fit(indices_TK, np.maximum(price_E, 0.0), regret, ended, stage, work)


def _round(
    problem: Problem, price_E: np.ndarray, v1_T: np.ndarray, v2_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stage 2: a top-k of S_t - b for every row, the gap proven for it, and the loads."""
    score_TE, narrow_TE, error, k, _, _ = problem
    indices_TK, gap_T = np.empty((len(score_TE), k), np.int64), np.empty(len(score_TE))
    load_E = np.zeros(len(price_E), np.int64)
    if rounding.choose_strict(narrow_TE, price_E, v1_T, v2_T, error, gap_T, indices_TK, load_E):
        tied = np.flatnonzero(gap_T <= 0.0)
        tied_nK = np.empty((len(tied), k), np.int64)
        rounding.choose_tied(score_TE[tied].astype(np.float64), price_E.astype(np.float64), tied_nK, load_E)
        indices_TK[tied] = tied_nK
    return indices_TK, gap_T, load_E


def _smallest(gap_T: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """The rows of the ``size`` smallest gaps, and a bound that no other gap is below."""
    if size >= len(gap_T):
        return np.arange(len(gap_T)), np.inf
    rows = np.argpartition(gap_T, size)[:size]
    return np.sort(rows), float(gap_T[rows].max())


def _classes(score_nE: np.ndarray, grouped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The class of every row, first row and size of every class; equal rows share one if ``grouped``."""
    n = len(score_nE)
    if not grouped:
        return np.arange(n), np.arange(n), np.ones(n, np.int64)
    # Sorted by a hash of their bits, equal rows are neighbours. A collision may split a class: no harm.
    factor_E = np.arange(1, 2 * score_nE.shape[1], 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hash_n = (score_nE.view(np.uint64) * factor_E).sum(axis=1)
    order = np.argsort(hash_n, kind="stable")
    new = np.ones(n, bool)
    alike = np.flatnonzero(hash_n[order[1:]] == hash_n[order[:-1]])
    new[alike + 1] = (score_nE[order[alike + 1]] != score_nE[order[alike]]).any(axis=1)
    class_n = np.empty(n, np.int64)
    class_n[order] = np.cumsum(new) - 1
    return class_n, order[new], np.bincount(class_n)


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
