"""From prices to the exact assignment: round, then repair what the rounding left unplaced.

The repair is handed only the rows of smallest gap: any other keeps its top-k until two prices have moved
apart by its gap. Equal rows are handed over as one class where there is much to place.

The loops spell out what NumPy would say in a line, because numba takes seconds to compile that line.

Shapes: T rows, E columns, k choices per row, C capacity, n rows of a subset, G classes of equal rows,
N nodes of the repair graph (E, or E + 1 with unused capacity).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from monge.ot.assignment.repair import DONE, OUT_OF_WORK, repair
from monge.ot.assignment.rounding import choose_strict, choose_tied, quantile, regret
from monge.ot.assignment.solution import STAGES

PRICES, REPAIR, FALLBACK = (STAGES.index(stage) for stage in ("prices", "repair", "fallback"))


@njit(cache=True, nogil=True)
def fit(score_TE, narrow_TE, error, capacity, slack, start_E, v1_T, v2_T, limit, indices_TK, price_E):
    """Write an assignment and prices that fit each other: every row holds a top-k of S_t - b.

    Args:
        score_TE: float32 or float64; ``narrow_TE`` the same in float32, within ``error`` of it.
        slack: E C > T k.
        start_E: float32 prices to start at, ``v1_T`` and ``v2_T`` the rows' k-th and (k+1)-th value there.
        limit: most paths to search.
        indices_TK, price_E: int64 and float64, filled in.

    Returns:
        How the repair ended, the stage and the paths searched; and the regret, by how much the rows miss
        their top-k after all: rounding only.
    """
    (num_rows, num_columns), k = score_TE.shape, indices_TK.shape[1]
    num_nodes = num_columns + slack
    price_N, start_N = np.zeros(num_nodes), np.zeros(num_nodes)
    for e in range(num_columns):
        price_N[e] = start_N[e] = start_E[e]
    gap_T, load_E = np.empty(num_rows), np.zeros(num_columns, np.int64)
    if choose_strict(narrow_TE, start_E, v1_T, v2_T, error, gap_T, indices_TK, load_E):
        choose_tied(score_TE, price_N, gap_T, indices_TK, load_E)

    free_E, excess_N = np.zeros(num_columns, np.int64), np.zeros(num_nodes, np.int64)
    if slack:
        excess_N[num_columns] = num_columns * capacity - num_rows * k
    unplaced = 0
    for e in range(num_columns):
        if slack and start_E[e] == 0:
            # A column without a price keeps its room as free slots; the others have to fill up.
            free_E[e] = max(capacity - load_E[e], 0)
            excess_N[num_columns] -= free_E[e]
        excess_N[e] = load_E[e] + free_E[e] - capacity
        unplaced += max(excess_N[e], 0)
    if slack:
        unplaced += max(excess_N[num_columns], 0)

    ended, stage, missed = DONE, PRICES, 0.0
    work = np.int64(0)  # a bare 0 is a type of its own, for which the repair would be compiled once more
    size = 4 * (unplaced + num_columns) + 16
    while unplaced > 0:
        stage = REPAIR if size < num_rows or stage == PRICES else FALLBACK
        row_n, cutoff = _smallest(gap_T, min(size, num_rows))
        score_nE, held_nK = np.empty((len(row_n), num_columns)), np.empty((len(row_n), k), np.int64)
        for i, t in enumerate(row_n):
            for e in range(num_columns):
                score_nE[i, e] = score_TE[t, e]
            for j in range(k):
                held_nK[i, j] = indices_TK[t, j]
        class_n, score_GE, size_G = _classes(score_nE, unplaced > num_columns)
        ended, work, reach = repair(
            score_GE, class_n, size_G, held_nK, price_N, start_N, free_E, excess_N, cutoff, work, limit
        )
        for i, t in enumerate(row_n):
            for j in range(k):
                indices_TK[t, j] = held_nK[i, j]
        if ended in (DONE, OUT_OF_WORK) or len(row_n) == num_rows:
            missed = regret(score_nE, price_N, held_nK)
            break
        asked = 0
        for t in range(num_rows):
            asked += gap_T[t] <= 1.5 * reach
        size = min(4 * size, max(2 * size, asked))
    level = price_N[num_nodes - 1]
    for e in range(0 if slack else num_columns):
        level = min(level, price_N[e])
    for e in range(num_columns):
        price_E[e] = max(price_N[e] - level, 0.0)
    return ended, stage, work, missed


@njit(cache=True, nogil=True)
def _smallest(gap_T, size):
    """The rows of the ``size`` smallest gaps, in order, and a bound that no other gap is below."""
    num_rows = gap_T.shape[0]
    cutoff = quantile(gap_T, size) if size < num_rows else np.inf
    room = size
    for t in range(num_rows):
        room -= gap_T[t] < cutoff
    row_n, n = np.empty(size, np.int64), 0
    for t in range(num_rows):
        tie = gap_T[t] == cutoff and room > 0
        if gap_T[t] < cutoff or tie:
            row_n[n] = t
            n += 1
            room -= tie
    return row_n, cutoff


@njit(cache=True, nogil=True)
def _classes(score_nE, grouped):
    """The class of every row, the scores and the size of every class; equal rows share one if ``grouped``."""
    n, num_columns = score_nE.shape
    class_n, size_G = np.arange(n), np.ones(n, np.int64)
    if not grouped:
        return class_n, score_nE, size_G
    score_GE, num_classes = np.empty((n, num_columns)), 0
    table = np.full(2 * n, -1)  # open addressing: a class is where its hash says, or in the next free place
    bits_nE = score_nE.view(np.uint64)
    for i in range(n):
        code = np.uint64(0)
        for e in range(num_columns):
            code = (code ^ bits_nE[i, e]) * np.uint64(0x9E3779B97F4A7C15)
            code ^= code >> np.uint64(32)
        place = np.int64(code % np.uint64(2 * n))
        while table[place] >= 0 and not _equal(score_GE[table[place]], score_nE[i]):
            place = (place + 1) % (2 * n)
        g = table[place]
        if g < 0:
            g = table[place] = num_classes
            size_G[g] = 0
            num_classes += 1
            for e in range(num_columns):
                score_GE[g, e] = score_nE[i, e]
        class_n[i] = g
        size_G[g] += 1
    return class_n, score_GE[:num_classes], size_G[:num_classes]


@njit(cache=True, nogil=True)
def _equal(x_E, y_E):
    """Whether two rows are the same."""
    same = True
    for e in range(x_E.shape[0]):
        same &= x_E[e] == y_E[e]
    return same
