"""From prices to an assignment: every row takes a top-k of S_t - b, ties are balanced; and its final order.

Shapes: T rows, E columns, k choices per row, n rows of a subset.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def choose_strict(score_TE, prices_E, v1_T, v2_T, score_error, gap_T, indices_TK, loads_E):
    """Give every row with a proven gap its k entries >= v1; returns how many rows have none (gap 0).

    ``score_TE`` is float32 and within ``score_error`` of the true scores. The gap is what is left of v1 -
    v2 after the rounding of both, so that it holds of the true scores.
    """
    num_columns, k = prices_E.shape[0], indices_TK.shape[1]
    chosen_E = np.empty(num_columns + 1, np.int64)
    tied = 0
    for t in range(score_TE.shape[0]):
        v1, v2 = np.float64(v1_T[t]), np.float64(v2_T[t])
        gap_T[t] = np.inf if v1 > v2 else 0.0
        if v2 > -np.inf:
            gap_T[t] = max(0.0, v1 - v2 - 2.0**-23 * max(abs(v1), abs(v2)) - 4.0 * score_error)
        if gap_T[t] <= 0.0:
            tied += 1
            continue
        n, threshold, row = 0, v1_T[t], score_TE[t]
        for e in range(num_columns):
            # Without a branch: a column that stays out is overwritten by the next.
            chosen_E[n] = e
            n += row[e] - prices_E[e] >= threshold
        for j in range(k):
            indices_TK[t, j] = chosen_E[j]
            loads_E[chosen_E[j]] += 1
    return tied


@njit(cache=True, nogil=True)
def _top(score_E, prices_E, value_E, top_K):
    """Write S - b to ``value_E`` and its k largest entries to ``top_K``, by falling value."""
    k = top_K.shape[0]
    top_K[:] = -np.inf
    for e in range(score_E.shape[0]):
        value_E[e] = x = score_E[e] - prices_E[e]
        if x > top_K[k - 1]:
            for j in range(k):
                if x > top_K[j]:
                    x, top_K[j] = top_K[j], x


@njit(cache=True, nogil=True)
def choose_tied(score_TE, prices_E, gap_T, indices_TK, loads_E):
    """Give rows without a gap a top-k of S - b in float64; of equal values, those least loaded so far."""
    num_columns, k = score_TE.shape[1], indices_TK.shape[1]
    value_E, top_K = np.empty(num_columns), np.empty(k)
    for t in range(score_TE.shape[0]):
        if gap_T[t] > 0.0:
            continue
        _top(score_TE[t], prices_E, value_E, top_K)
        threshold, n = top_K[k - 1], 0
        for e in range(num_columns):
            if value_E[e] > threshold:
                indices_TK[t, n] = e
                n += 1
        while n < k:
            best = -1
            for e in range(num_columns):
                if value_E[e] == threshold and (best < 0 or loads_E[e] < loads_E[best]):
                    best = e
            value_E[best] = -np.inf
            indices_TK[t, n] = best
            n += 1
        for j in range(k):
            loads_E[indices_TK[t, j]] += 1


@njit(cache=True, nogil=True)
def regret(score_nE, prices_E, indices_nK):
    """By how much the k largest entries of S - b exceed what the rows hold of it, summed over the rows."""
    num_columns, k = score_nE.shape[1], indices_nK.shape[1]
    value_E, top_K = np.empty(num_columns), np.empty(k)
    total = 0.0
    for t in range(score_nE.shape[0]):
        _top(score_nE[t], prices_E, value_E, top_K)
        for j in range(k):
            total += top_K[j] - value_E[indices_nK[t, j]]
    return total


@njit(cache=True, nogil=True)
def finish(score_TE, indices_TK, prices_E, capacity, loads_E):
    """Order every row by falling score, ties by lower column, and count ``loads_E`` (given as 0).

    Returns the objective and the price of what the columns leave unsold, ``sum_e (capacity - load_e) b_e``.
    """
    objective, unsold, k = 0.0, 0.0, indices_TK.shape[1]
    value_K = np.empty(k, score_TE.dtype)
    for t in range(score_TE.shape[0]):
        score_E, row_K = score_TE[t], indices_TK[t]
        for i in range(k):
            e = row_K[i]
            s = score_E[e]
            objective += s
            loads_E[e] += 1
            j = i
            while j > 0 and (value_K[j - 1] < s or (value_K[j - 1] == s and row_K[j - 1] > e)):
                value_K[j], row_K[j] = value_K[j - 1], row_K[j - 1]
                j -= 1
            value_K[j], row_K[j] = s, e
    for e in range(loads_E.shape[0]):
        unsold += (capacity - loads_E[e]) * prices_E[e]
    return objective, unsold


@njit(cache=True, nogil=True)
def quantile(value_n, count):
    """A bound that ``count`` of the non-negative values are at most, or more only if they tie at it.

    Bisection of the bits, which are ordered like the values: at most 63 passes whatever the values are.
    """
    bits_n = value_n.view(np.int64)
    low, high = np.int64(-1), np.int64(0x7FF0000000000000)
    while high - low > 1:
        middle, below = low + (high - low) // 2, 0
        for i in range(bits_n.shape[0]):
            below += bits_n[i] <= middle
        if below < count:
            low = middle
        else:
            high = middle
            if below == count:
                break
    return np.array([high]).view(np.float64)[0]
