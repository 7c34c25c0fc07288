"""Price ascent: sweeps over all rows that move every price at once towards the balanced one.

For prices b, row t wants the k largest entries of a_t = S_t - b. With v1 and v2 its k-th and (k+1)-th largest
value, the margin of the pair (t, e) is how far b_e can move before t changes its mind about e:

    m_te = a_te - (v2_t if a_te >= v1_t else v1_t),        chosen <=> m_te >= 0 (tied: m_te = 0).

The C-th largest margin of column e is therefore the change of b_e that brings its load to C while the other
prices rest: the exact coordinate step of the dual. A sweep counts the margins above +-w_e 4^-i, i < 6, and
above 0, which brackets the C-th margin of every column at once; the price step interpolates in the bracket,
and the step taken sets the next w_e.

Everything is float32 on tiles of 256 rows with a column contiguous inside its tile, so that all inner loops
run over rows and vectorise. Rounding S - b is monotone, hence v1 > v2 in float32 proves the row's set
exactly.

Shapes: T rows, E columns, k choices per row, C capacity.
"""

from __future__ import annotations

import numpy as np
from numba import int32, njit

from monge.ot.assignment.rounding import quantile

TILE = 256
LEVELS = 6
BINS = 2 * LEVELS + 2
LO, HI = LEVELS, LEVELS + 1  # bins of the strict (m > 0) and the weak (m >= 0) load
MAX_STEPS = 64
PATIENCE = 4  # steps in which an eighth of a unit per column has to be placed: else the repair is faster


@njit(cache=True, nogil=True)
def pack(score_TE):
    """The rows as tiles (ceil(T/256), E rounded up to even, 256), padded with -inf."""
    num_rows, num_columns = score_TE.shape
    tiles = np.full(((num_rows + TILE - 1) // TILE, num_columns + num_columns % 2, TILE), np.float32(-np.inf))
    # Blocks of 16 x 16: a cache line of every row, a cache line of every column.
    for q in range(tiles.shape[0]):
        tile, rows = tiles[q], score_TE[q * TILE : (q + 1) * TILE]
        for i0 in range(0, rows.shape[0], 16):
            block = rows[i0 : i0 + 16]
            for e0 in range(0, num_columns, 16):
                for e in range(e0, min(num_columns, e0 + 16)):
                    column = tile[e, i0 : i0 + 16]
                    for i in range(block.shape[0]):
                        column[i] = block[i, e]
    return tiles


@njit(cache=True, nogil=True)
def _thresholds(tile, prices_E, v, x0, x1):
    """The largest entries of S - b of 256 rows, in ``v`` by falling value.

    An insertion network: each new entry sinks through the rows of ``v``, two columns in one pass over them.
    """
    v[:] = -np.inf
    for e in range(0, tile.shape[0], 2):
        b0, b1 = prices_E[e], prices_E[min(e + 1, prices_E.shape[0] - 1)]
        s0, s1 = tile[e], tile[e + 1]
        for i in range(TILE):
            x0[i] = s0[i] - b0
            x1[i] = s1[i] - b1
        for j in range(0, v.shape[0], 3):
            r0, r1, r2 = v[j], v[j + 1], v[j + 2]
            for i in range(TILE):
                y, z = x0[i], x1[i]
                r = r0[i]
                top, y = max(r, y), min(r, y)
                r0[i], z = max(top, z), min(top, z)
                r = r1[i]
                top, y = max(r, y), min(r, y)
                r1[i], z = max(top, z), min(top, z)
                r = r2[i]
                top, y = max(r, y), min(r, y)
                r2[i], z = max(top, z), min(top, z)
                x0[i], x1[i] = y, z


# 32 bits wide like the margins, so that a vector holds as many counters as margins.
@njit(cache=True, nogil=True, locals={f"c{j}": int32 for j in range(BINS)})
def _count(m, n, w, bins):
    """Add to ``bins`` how many of n margins are > w, w/4, ..., w/1024, > 0, >= 0, > -w/1024, ..., -w."""
    quarter = np.float32(0.25)
    zero = np.float32(0)
    w1 = w * quarter
    w2 = w1 * quarter
    w3 = w2 * quarter
    w4 = w3 * quarter
    w5 = w4 * quarter
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = c10 = c11 = c12 = c13 = 0
    for i in range(n):
        x = m[i]
        c0 += x > w
        c1 += x > w1
        c2 += x > w2
        c3 += x > w3
        c4 += x > w4
        c5 += x > w5
        c6 += x > zero
        c7 += x >= zero
        c8 += x > -w5
        c9 += x > -w4
        c10 += x > -w3
        c11 += x > -w2
        c12 += x > -w1
        c13 += x > -w
    counts = (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13)
    for j in range(BINS):
        bins[j] += counts[j]


@njit(cache=True, nogil=True)
def sweep(tiles, n, k, prices_E, width_E, v1_T, v2_T, bins_EB):
    """One pass over n packed rows: their values ``v1_T``, ``v2_T`` and the margin counts ``bins_EB``."""
    v = np.empty(((k + 3) // 3 * 3, TILE), np.float32)
    x0, x1 = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bins_EB[:] = 0
    for q in range(tiles.shape[0]):
        _thresholds(tiles[q], prices_E, v, x0, x1)
        a1, a2 = v[k - 1], v[k]
        valid = min(TILE, n - q * TILE)
        for i in range(valid):
            v1_T[q * TILE + i] = a1[i]
            v2_T[q * TILE + i] = a2[i]
        for e in range(prices_E.shape[0]):
            s, b = tiles[q, e], prices_E[e]
            for i in range(valid):
                a = s[i] - b
                x0[i] = a - (a2[i] if a >= a1[i] else a1[i])
            _count(x0, valid, width_E[e], bins_EB[e])


@njit(cache=True, nogil=True)
def _coordinate_step(bins, w, capacity):
    """The C-th largest margin read off its counts; beyond the outer thresholds, the width itself."""
    if bins[LO] <= capacity <= bins[HI]:
        return 0.0
    if bins[0] >= capacity:
        return w
    if bins[BINS - 1] <= capacity:
        return -w
    j = 1
    while bins[j] < capacity:
        j += 1
    # The C-th margin lies between thresholds j-1 and j; where several hold exactly C take the middle of them.
    last = j
    while bins[j] == capacity and bins[last + 1] == capacity:
        last += 1
    t_first, t_j, t_last = _threshold(j - 1, w), _threshold(j, w), _threshold(last, w)
    if last > j:
        return 0.5 * (t_j + t_last)
    return t_first + (t_j - t_first) * (capacity - bins[j - 1]) / (bins[j] - bins[j - 1])


@njit(cache=True, nogil=True)
def _threshold(j, w):
    if j < LEVELS:
        return w * 0.25**j
    return -w * 0.25 ** (BINS - 1 - j) if j > HI else 0.0


@njit(cache=True, nogil=True)
def unplaced(bins_EB, prices_E, capacity, slack):
    """How many units no tie-breaking can place: overload, or room in columns that must be full."""
    over = under = 0
    for e in range(prices_E.shape[0]):
        over += max(0, bins_EB[e, LO] - capacity)
        if not slack or prices_E[e] > 0:
            under += max(0, capacity - bins_EB[e, HI])
    return max(over, under)


@njit(cache=True, nogil=True)
def _spread(score_TE):
    """A quarter of the range of the scores, without the lowest twentieth, which may stand for "never"."""
    num_columns = score_TE.shape[1]
    stride = score_TE.size // 256 | 1  # odd: to meet all columns
    some, n, top = np.empty(score_TE.size // stride + 1), 0, -np.inf
    for i in range(0, score_TE.size, stride):
        x = np.float64(score_TE[i // num_columns, i % num_columns])
        if x > -np.inf:
            some[n] = x
            n += 1
            top = max(top, x)
    if n == 0:
        return np.float32(1)
    for i in range(n):
        some[i] = top - some[i]
    return np.float32(max(0.25 * quantile(some[:n], n - n // 20), 1e-30))


@njit(cache=True, nogil=True)
def ascend(score_TE, k, capacity, slack, prices_E, width_E, v1_T, v2_T):
    """Price steps in place until half a unit per column is unplaced or progress is slow; returns the units.

    ``prices_E`` (float32) ends as the best prices met, ``v1_T`` and ``v2_T`` as the rows' values at them.
    ``width_E`` holds the widths of the first step (0: find them) and ends as the accuracy of these prices as
    a sample of more rows: the widths of the first step at which the loads were within their sampling error.
    """
    (n, num_columns), tiles, spread = score_TE.shape, pack(score_TE), _spread(score_TE)
    for e in range(num_columns):
        width_E[e] = max(width_E[e], np.float32(1e-6) * spread) if width_E[e] > 0 else spread
    bins_EB = np.empty((num_columns, BINS), np.int64)
    best_E, next_E, w_E = prices_E.copy(), prices_E.astype(np.float64), width_E.copy()
    noise = 0.5 * num_columns * np.sqrt(capacity)
    widest = np.float32(1e9) * width_E[0]
    best = goal = n * k + 1
    coarse, at_best = True, False
    for step in range(MAX_STEPS + 1):
        sweep(tiles, n, k, prices_E, w_E, v1_T, v2_T, bins_EB)
        left = unplaced(bins_EB, prices_E, capacity, slack)
        at_best = left < best
        if at_best:
            best = left
            _copy(prices_E, best_E)
        if coarse:
            _copy(w_E, width_E)
            coarse = left > noise
        if step % PATIENCE == 0:
            if best > goal:
                break
            goal = best - num_columns // 8 - 1
        if left <= num_columns // 2 or step == MAX_STEPS:
            break
        mean, lowest = 0.0, np.inf
        for e in range(num_columns):
            move = _coordinate_step(bins_EB[e], np.float64(w_E[e]), capacity)
            clipped = abs(move) == w_E[e]
            new = next_E[e] + move
            if slack:
                new = max(0.0, new)
            moved = abs(new - next_E[e])
            next_E[e] = new
            lowest = min(lowest, new)
            mean += moved / num_columns
            w_E[e] = np.float32((4.0 if clipped else 1.0) * moved)
        for e in range(num_columns):
            next_E[e] -= 0.0 if slack else lowest
            w_E[e] = min(max(np.float32(w_E[e] + 0.5 * mean), np.float32(1e-30)), widest)
            prices_E[e] = np.float32(next_E[e])
    if not at_best:
        _copy(best_E, prices_E)
        sweep(tiles, n, k, prices_E, w_E, v1_T, v2_T, bins_EB)
    return best


@njit(cache=True, nogil=True)
def _copy(x_E, y_E):
    """``y_E[:] = x_E``, which numba takes three seconds to compile."""
    for e in range(x_E.shape[0]):
        y_E[e] = x_E[e]
