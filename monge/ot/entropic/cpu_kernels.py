"""Compiled inner loops of the CPU forms: one pass over the scores scales the rows and sums the columns.

Scores are laid out in tiles of 64 rows, the columns' values of one tile contiguous in the rows. So every
loop, the row maxima and row sums included, runs over neighbouring rows and vectorises without reordering a
sum. Storage is float32 or float64, arithmetic is float64 throughout (it costs nothing beside the memory
traffic), and ``exp`` is a polynomial that vectorises too.

Shapes: T rows, E columns, N tiles of L rows; ``tiles_NEL[n, e, l]`` belongs to row ``n * L + l``. Rows beyond
T have mass 0. A row without mass has scores 0 in its tile, so that nothing of it is ever not finite.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from monge.ot.entropic.iteration import RATE_SPAN, hopeless

TILE = 64
_BLOCK = 16  # columns transposed at a time: a cache line of float32
_LANES = 16  # partial sums kept per column: one vector of float32 wide, two of float64

_compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
_inlined = njit(inline="always")
_hopeless = njit(hopeless)

_LOG2E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # ln 2 in two parts: the first times an exponent is exact
_LN2_LOW = 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest integer in the low bits
_TINY = np.finfo(np.float64).tiny
_LOWEST = -708.0  # exp below is taken as 0: a float64 would be subnormal


@_inlined
def _exp(x):
    """exp(x) for x <= 0 (or a rounding above), -inf included, to two units in the last place."""
    bounded = max(x, _LOWEST)
    shifted = bounded * _LOG2E + _ROUND
    exponent = shifted - _ROUND
    r = (bounded - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    power = np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)
    return p * power if x >= _LOWEST else 0.0


@_compiled
def mass_flags(row_BT, col_BE):
    """Whether a row mass, or a column mass, is negative or not finite; whether only rows have mass."""
    bad_row = False
    bad_col = False
    loose = False
    for b in range(row_BT.shape[0]):
        some_row = False
        for t in range(row_BT.shape[1]):
            bad_row |= not 0 <= row_BT[b, t] < np.inf  # NaN fails too
            some_row |= row_BT[b, t] > 0
        no_col = True
        for e in range(col_BE.shape[1]):
            bad_col |= not 0 <= col_BE[b, e] < np.inf
            no_col &= col_BE[b, e] == 0
        loose |= some_row and no_col
    return bad_row, bad_col, loose


@_compiled
def survey(scores_TE, mass_T, top_E, negated_bottom_E, flags_2):
    """Over rows with mass: each column's largest and, negated, smallest finite score (-inf where there is
    none).

    The flags say whether any score is NaN or +inf, and whether any is -inf.
    """
    top_E[:] = -np.inf
    negated_bottom_E[:] = -np.inf
    bad = 0
    holes = 0
    for t in range(scores_TE.shape[0]):
        if mass_T[t] > 0:
            for e in range(scores_TE.shape[1]):
                x = np.float64(scores_TE[t, e])
                bad += not x < np.inf
                holes += x == -np.inf
                low = -x if x > -np.inf else x
                top_E[e] = x if x > top_E[e] else top_E[e]
                negated_bottom_E[e] = low if low > negated_bottom_E[e] else negated_bottom_E[e]
    flags_2[0] = bad > 0
    flags_2[1] = holes > 0


@_compiled
def fill_tiles(scores_TE, mass_T, offset_E, inverse_epsilon, as_kernel, first, last, tiles_NEL):
    """Lay the scores out in tiles first..last-1, ``as_kernel`` as ``exp(score / epsilon + offset_e)``."""
    T, E = scores_TE.shape
    blocks = E - E % _BLOCK
    for n in range(first, last):
        tile = tiles_NEL[n]
        for l in range(TILE):
            t = n * TILE + l
            if t < T and mass_T[t] > 0:
                for e in range(blocks, E):
                    tile[e, l] = scores_TE[t, e]
            else:
                tile[:, l] = 0.0
        for block in range(0, blocks, _BLOCK):
            for l in range(TILE):
                t = n * TILE + l
                if t < T and mass_T[t] > 0:
                    for e in range(_BLOCK):
                        tile[block + e, l] = scores_TE[t, block + e]
        if as_kernel:
            for e in range(E):
                offset = offset_E[e]
                for l in range(TILE):
                    tile[e, l] = _exp(tile[e, l] * inverse_epsilon + offset)


@_compiled
def column_sums(tiles_NEL, mass_T, log_v_E, inverse_epsilon, as_kernel, first, last, sums_E):
    """Column sums over tiles first..last-1 of the plan ``mass_t * softmax_e(S / epsilon + log_v)``.

    ``as_kernel``: the tiles hold ``exp(S / epsilon)`` up to factors of the columns, and ``log_v`` is relative
    to these.
    """
    _, E, L = tiles_NEL.shape
    lanes = np.zeros((E, _LANES))
    row = np.empty(L)
    if as_kernel:
        v_E = np.exp(log_v_E - log_v_E.max())
        for n in range(first, last):
            _row_sums(tiles_NEL[n], v_E, row)
            _add_scaled_columns(tiles_NEL[n], mass_T[n * L : (n + 1) * L], row, lanes)
        for e in range(E):
            sums_E[e] = _lane_sum(lanes[e]) * v_E[e]
    else:
        top = np.empty(L)
        weight = np.empty((E, L))
        for n in range(first, last):
            _softmax_weights(tiles_NEL[n], log_v_E, inverse_epsilon, top, row, weight)
            _add_scaled_columns(weight, mass_T[n * L : (n + 1) * L], row, lanes)
        for e in range(E):
            sums_E[e] = _lane_sum(lanes[e])


@_compiled
def iterate(
    tiles_NEL, mass_T, inverse_epsilon, as_kernel, log_v_E, target_E, unit, tol, max_iters, give_up_until
):
    """The loop of iteration.iterate for one problem, ``log_v_E`` in place; returns sweeps and error."""
    E = target_E.shape[0]
    sums_E = np.empty(E)
    errors = np.empty(max_iters + 1)
    step = 0
    while True:
        step += 1
        column_sums(tiles_NEL, mass_T, log_v_E, inverse_epsilon, as_kernel, 0, tiles_NEL.shape[0], sums_E)
        error = 0.0
        for e in range(E):
            error = max(error, abs(sums_E[e] - target_E[e]))
        error /= unit
        errors[step] = error
        if error <= tol or step == max_iters:
            return step, error
        if RATE_SPAN < step <= give_up_until and _hopeless(
            error, errors[step - RATE_SPAN], RATE_SPAN, step, tol, max_iters
        ):
            return step, error
        for e in range(E):
            if target_E[e] > 0:
                log_v_E[e] += np.log(target_E[e]) - np.log(max(sums_E[e], _TINY))


@_compiled
def write_plan(
    tiles_NEL, scale_T, log_v_E, inverse_epsilon, as_kernel, first, last, out_TE, log_sum_T, total_T
):
    """Write ``scale_t * softmax_e(S / epsilon + log_v)`` for the rows of tiles first..last-1.

    Beside it each row's log-sum-exp and the total of what was written, rounding included. All are written
    from the top of the outputs on. ``out_TE`` may be the memory of these very tiles: each is read before it
    is written. ``as_kernel`` as in :func:`column_sums`.
    """
    _, E, L = tiles_NEL.shape
    row = np.empty(L)
    top = np.empty(L)
    total = np.empty(L)
    weight = np.empty((E, L))
    rounded = np.empty((E, L), out_TE.dtype)
    if as_kernel:
        top[:] = log_v_E.max()
        v_E = np.exp(log_v_E - log_v_E.max())
    for n in range(first, last):
        if as_kernel:
            tile = tiles_NEL[n]
            _row_sums(tile, v_E, row)
            for e in range(E):
                for l in range(L):
                    weight[e, l] = tile[e, l] * v_E[e]
        else:
            _softmax_weights(tiles_NEL[n], log_v_E, inverse_epsilon, top, row, weight)
        start = (n - first) * L
        rows = min(L, out_TE.shape[0] - start)
        for l in range(rows):
            log_sum_T[start + l] = top[l] + np.log(row[l])
        for l in range(L):
            row[l] = scale_T[n * L + l] / row[l] if row[l] > 0 else 0.0
        total[:] = 0.0
        for e in range(E):
            for l in range(L):
                rounded[e, l] = weight[e, l] * row[l]
                total[l] += rounded[e, l]
        total_T[start : start + rows] = total[:rows]
        _write_rows(rounded, out_TE[start : start + rows])


@_inlined
def _row_sums(tile, v_E, row):
    row[:] = 0.0
    for e in range(tile.shape[0]):
        v = v_E[e]
        for l in range(TILE):
            row[l] += tile[e, l] * v


@_inlined
def _write_rows(tile, out_LE):
    """out[l, e] = tile[e, l], a block of columns at a time."""
    E = tile.shape[0]
    blocks = E - E % _BLOCK
    for block in range(0, blocks, _BLOCK):
        for l in range(out_LE.shape[0]):
            for e in range(_BLOCK):
                out_LE[l, block + e] = tile[block + e, l]
    for l in range(out_LE.shape[0]):
        for e in range(blocks, E):
            out_LE[l, e] = tile[e, l]


@_inlined
def _softmax_weights(tile, log_v_E, inverse_epsilon, top, row, weight):
    E, L = tile.shape
    top[:] = -np.inf
    for e in range(E):
        offset = log_v_E[e]
        for l in range(L):
            x = tile[e, l] * inverse_epsilon + offset
            top[l] = x if x > top[l] else top[l]
    row[:] = 0.0
    for e in range(E):
        offset = log_v_E[e]
        for l in range(L):
            w = _exp(tile[e, l] * inverse_epsilon + offset - top[l])
            weight[e, l] = w
            row[l] += w


@_inlined
def _add_scaled_columns(weight, mass, row, lanes):
    """lanes[e] += weight[e] * mass / row, all quarters of the tile into them; ``row`` becomes the factor."""
    for l in range(TILE):
        row[l] = mass[l] / row[l] if row[l] > 0 else 0.0
    for e in range(weight.shape[0]):
        for l in range(_LANES):
            lanes[e, l] += (row[l] * weight[e, l] + row[l + 16] * weight[e, l + 16]) + (
                row[l + 32] * weight[e, l + 32] + row[l + 48] * weight[e, l + 48]
            )


@_inlined
def _lane_sum(lanes):
    total = 0.0
    for l in range(_LANES):
        total += lanes[l]
    return total
