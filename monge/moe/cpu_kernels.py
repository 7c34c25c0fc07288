"""Compiled loops for few rows per expert, where a matrix product is bound by reading the weights once.

Both projections keep transformers' layout, whose rows are contiguous over the summed dimension, so every
output is a dot product of two contiguous vectors and no weight is copied. Two rows of hidden states meet four
of the weights: eight sums, the most that stay in registers beside their factors. The four lie a quarter of
the thread's rows apart, so that the memory delivers four long streams. One stream at a time is a quarter
slower, and four neighbouring rows, which change place at every row, up to a half (docs/performance.md).
Bfloat16 weights are read as uint16 and widened on the way.

Every output is written by one thread and sums run in a fixed order: results do not depend on the threads.

Shapes: T tokens, N filled slots sorted by expert, K slots per token, E experts, H model width, I expert
width, J = 2 I (gated) or I; expert e has the sorted slots starts[e]..starts[e + 1] - 1; X any width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

# sums may be reordered into vectors; NaN and infinity keep their meaning
_compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def _wide(x: Any) -> Any:
    """In compiled code: uint16, the bits of a bfloat16, as float32; other numbers as they are."""
    return x


@overload(_wide, inline="always")
def _(x):  # type: ignore[no-untyped-def]
    if isinstance(x, types.Integer):
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@_compiled
def _dot_2x4(x_nX, r, s, w0_X, w1_X, w2_X, w3_X):
    """The products of the rows r and s of ``x`` with four rows of weights."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = x_nX.dtype.type(0)
    for i in range(w0_X.shape[0]):
        x, y = x_nX[r, i], x_nX[s, i]
        w = _wide(w0_X[i])
        a0 += w * x
        b0 += w * y
        w = _wide(w1_X[i])
        a1 += w * x
        b1 += w * y
        w = _wide(w2_X[i])
        a2 += w * x
        b2 += w * y
        w = _wide(w3_X[i])
        a3 += w * x
        b3 += w * y
    return a0, a1, a2, a3, b0, b1, b2, b3


@_compiled
def _dot_1x4(x_nX, r, w0_X, w1_X, w2_X, w3_X):
    """The products of the row r of ``x`` with four rows of weights."""
    a0 = a1 = a2 = a3 = x_nX.dtype.type(0)
    for i in range(w0_X.shape[0]):
        x = x_nX[r, i]
        a0 += _wide(w0_X[i]) * x
        a1 += _wide(w1_X[i]) * x
        a2 += _wide(w2_X[i]) * x
        a3 += _wide(w3_X[i]) * x
    return a0, a1, a2, a3


@_compiled
def project_in(x_TH, tokens_N, starts_E1, weights_EJH, first, last, pre_NJ):
    """``pre[n, j] = <weights[e, j], x[tokens[n]]>`` for j in first..last-1 and the slots n of every e."""
    quarter = (last - first + 3) // 4
    for e in range(weights_EJH.shape[0]):
        begin, end = starts_E1[e], starts_E1[e + 1]
        if begin == end:
            continue
        pairs = end - (end - begin) % 2
        for j in range(first, first + quarter):
            j1, j2, j3 = _streams(j, quarter, last)
            w0, w1, w2, w3 = weights_EJH[e, j], weights_EJH[e, j1], weights_EJH[e, j2], weights_EJH[e, j3]
            for n in range(begin, pairs, 2):
                a, b = pre_NJ[n], pre_NJ[n + 1]
                sums = _dot_2x4(x_TH, tokens_N[n], tokens_N[n + 1], w0, w1, w2, w3)
                a[j], a[j1], a[j2], a[j3], b[j], b[j1], b[j2], b[j3] = sums
            for n in range(pairs, end):
                a = pre_NJ[n]
                a[j], a[j1], a[j2], a[j3] = _dot_1x4(x_TH, tokens_N[n], w0, w1, w2, w3)


@_compiled
def project_out(act_NI, tokens_N, gates_N, starts_E1, weights_EHI, first, last, out_TH):
    """``out[tokens[n], h] += gates[n] * <weights[e, h], act[n]>`` for h in first..last-1, e ascending."""
    quarter = (last - first + 3) // 4
    for e in range(weights_EHI.shape[0]):
        begin, end = starts_E1[e], starts_E1[e + 1]
        if begin == end:
            continue
        pairs = end - (end - begin) % 2
        for h in range(first, first + quarter):
            h1, h2, h3 = _streams(h, quarter, last)
            w0, w1, w2, w3 = weights_EHI[e, h], weights_EHI[e, h1], weights_EHI[e, h2], weights_EHI[e, h3]
            for n in range(begin, pairs, 2):
                a0, a1, a2, a3, b0, b1, b2, b3 = _dot_2x4(act_NI, n, n + 1, w0, w1, w2, w3)
                _add(out_TH[tokens_N[n]], gates_N[n], h, quarter, last, a0, a1, a2, a3)
                _add(out_TH[tokens_N[n + 1]], gates_N[n + 1], h, quarter, last, b0, b1, b2, b3)
            for n in range(pairs, end):
                a0, a1, a2, a3 = _dot_1x4(act_NI, n, w0, w1, w2, w3)
                _add(out_TH[tokens_N[n]], gates_N[n], h, quarter, last, a0, a1, a2, a3)


@_compiled
def _streams(row, quarter, last):
    """The rows of the other three streams. Beyond the range it is its last row, computed once more."""
    return min(row + quarter, last - 1), min(row + 2 * quarter, last - 1), min(row + 3 * quarter, last - 1)


@_compiled
def _add(out_H, gate, h, quarter, last, a0, a1, a2, a3):
    """Add the four sums to the places a quarter apart, those beyond the range left out."""
    out_H[h] += gate * a0
    if h + quarter < last:
        out_H[h + quarter] += gate * a1
    if h + 2 * quarter < last:
        out_H[h + 2 * quarter] += gate * a2
    if h + 3 * quarter < last:
        out_H[h + 3 * quarter] += gate * a3


@_compiled
def add_rows(values_nH, tokens_n, gates_n, first, last, out_TH):
    """``out[tokens[n], h] += gates[n] * values[n, h]`` for h in first..last-1, the rows n in their order."""
    for n in range(values_nH.shape[0]):
        gate = gates_n[n]
        out_H, values_H = out_TH[tokens_n[n], first:last], values_nH[n, first:last]
        for h in range(last - first):
            out_H[h] += gate * values_H[h]


@_compiled
def sort_by_expert(experts_TK, num_experts, padded):
    """A stable counting sort of the flat slots by expert; empty ones (-1) last if ``padded``, else left out.

    Returns ``starts`` (E + 1,), the token and the slot of each of the R rows, and the row of every slot
    (T, K), which is R for an empty one.
    """
    T, K = experts_TK.shape
    place_E1 = np.zeros(num_experts + 1, np.int64)
    for t in range(T):
        for k in range(K):
            e = experts_TK[t, k]
            if e >= num_experts:
                raise IndexError("an expert's index is not below the number of experts")
            if e >= 0:
                place_E1[e + 1] += 1
    for e in range(num_experts):
        place_E1[e + 1] += place_E1[e]
    starts_E1 = place_E1.copy()
    empty = place_E1[-1]
    R = T * K if padded else empty
    tokens_R, order_R = np.empty(R, np.int64), np.empty(R, np.int64)
    rows_TK = np.full((T, K), R)
    for t in range(T):
        for k in range(K):
            e = experts_TK[t, k]
            row = empty
            if e >= 0:
                row = place_E1[e]
                place_E1[e] += 1
                rows_TK[t, k] = row
            else:
                empty += 1
            if row < R:
                tokens_R[row] = t
                order_R[row] = t * K + k
    return starts_E1, tokens_R, order_R, rows_TK
