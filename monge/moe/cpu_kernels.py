"""Compiled loops for few rows per expert, where a matrix product is bound by reading the weights once.

Both projections keep transformers' layout, whose rows are contiguous over the summed dimension, so every
output is a dot product of two contiguous vectors and no weight is copied. Four rows of hidden states meet two
of the weights: eight sums, the most that stay in registers beside their factors. Bfloat16 weights are read as
uint16 and widened on the way, which costs two instructions for eight products. While one pair of weight rows
is at work the beginnings of the next pages are prefetched: the processor's own prefetcher stops at each 4 KiB
boundary, and would start again only after a miss.

Every output is written by one thread and sums run in a fixed order: results do not depend on the threads.

Shapes: T tokens, N filled slots sorted by expert, K slots per token, E experts, H model width, I expert
width, J = 2 I (gated) or I; expert e has the sorted slots starts[e]..starts[e + 1] - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# sums may be reordered into vectors; NaN and infinity keep their meaning
_compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

_LINE = 64  # bytes of a cache line
_PAGE = 4096  # bytes, where the processor's prefetcher stops
_AHEAD = 12  # lines of each page that are asked for: by then its prefetcher has taken over


def _wide(x: Any) -> Any:
    """In compiled code: uint16, the bits of a bfloat16, as float32; other numbers as they are."""
    return x


@overload(_wide, inline="always")
def _(x):  # type: ignore[no-untyped-def]
    if isinstance(x, types.Integer):
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@intrinsic
def _prefetch(_, array, index):  # type: ignore[no-untyped-def]
    """Ask for the cache line of ``array[index]``, flat and unchecked: a prefetch never faults."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        # for reading, into all levels, of data
        builder.call(function, [address, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), build


@_compiled
def _prefetch_pages(weights, first, last):
    """The first lines of every page of flat elements first..last-1."""
    line = _LINE // weights.itemsize
    page = _PAGE // weights.itemsize
    for start in range(first, last, page):
        for index in range(start, min(start + _AHEAD * line, last), line):
            _prefetch(weights, index)


@_compiled
def _dot_4x2(x_nX, t0, t1, t2, t3, w_X, v_X):
    """Products of four rows of ``x`` with two rows of weights."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = x_nX.dtype.type(0)
    for i in range(w_X.shape[0]):
        x0, x1, x2, x3 = x_nX[t0, i], x_nX[t1, i], x_nX[t2, i], x_nX[t3, i]
        w = _wide(w_X[i])
        a0 += w * x0
        a1 += w * x1
        a2 += w * x2
        a3 += w * x3
        v = _wide(v_X[i])
        b0 += v * x0
        b1 += v * x1
        b2 += v * x2
        b3 += v * x3
    return a0, a1, a2, a3, b0, b1, b2, b3


@_compiled
def _dot_1x2(x_nX, t, w_X, v_X):
    """Products of one row of ``x`` with two rows of weights."""
    a = b = x_nX.dtype.type(0)
    for i in range(w_X.shape[0]):
        a += _wide(w_X[i]) * x_nX[t, i]
        b += _wide(v_X[i]) * x_nX[t, i]
    return a, b


@_compiled
def project_in(x_TH, tokens_N, starts_E1, weights_EJH, first, last, pre_NJ):
    """``pre[n, j] = <weights[e, j], x[tokens[n]]>`` for j in first..last-1 and the slots n of every expert e."""
    E, J, H = weights_EJH.shape
    for e in range(E):
        begin, end = starts_E1[e], starts_E1[e + 1]
        if begin == end:
            continue
        full = end - (end - begin) % 4
        for j in range(first, last, 2):
            k = min(j + 1, last - 1)  # the last of an odd number is computed twice
            w_H, v_H = weights_EJH[e, j], weights_EJH[e, k]
            _prefetch_pages(weights_EJH, (e * J + j + 2) * H, (e * J + j + 4) * H)
            for n in range(begin, full, 4):
                a0, a1, a2, a3, b0, b1, b2, b3 = _dot_4x2(
                    x_TH, tokens_N[n], tokens_N[n + 1], tokens_N[n + 2], tokens_N[n + 3], w_H, v_H
                )
                pre_NJ[n, j], pre_NJ[n + 1, j], pre_NJ[n + 2, j], pre_NJ[n + 3, j] = a0, a1, a2, a3
                pre_NJ[n, k], pre_NJ[n + 1, k], pre_NJ[n + 2, k], pre_NJ[n + 3, k] = b0, b1, b2, b3
            for n in range(full, end):
                pre_NJ[n, j], pre_NJ[n, k] = _dot_1x2(x_TH, tokens_N[n], w_H, v_H)


@_compiled
def project_out(act_NI, tokens_N, gates_N, starts_E1, weights_EHI, first, last, out_TH):
    """``out[tokens[n], h] += gates[n] * <weights[e, h], act[n]>`` for h in first..last-1, experts ascending."""
    E, H, I = weights_EHI.shape
    for e in range(E):
        begin, end = starts_E1[e], starts_E1[e + 1]
        if begin == end:
            continue
        full = end - (end - begin) % 4
        for h in range(first, last, 2):
            k = min(h + 1, last - 1)
            twice = k > h
            w_I, v_I = weights_EHI[e, h], weights_EHI[e, k]
            ahead = (e * H + h) * I + _PAGE // weights_EHI.itemsize
            _prefetch_pages(weights_EHI, ahead, ahead + 2 * I)
            for n in range(begin, full, 4):
                a0, a1, a2, a3, b0, b1, b2, b3 = _dot_4x2(act_NI, n, n + 1, n + 2, n + 3, w_I, v_I)
                out_TH[tokens_N[n], h] += gates_N[n] * a0
                out_TH[tokens_N[n + 1], h] += gates_N[n + 1] * a1
                out_TH[tokens_N[n + 2], h] += gates_N[n + 2] * a2
                out_TH[tokens_N[n + 3], h] += gates_N[n + 3] * a3
                if twice:
                    out_TH[tokens_N[n], k] += gates_N[n] * b0
                    out_TH[tokens_N[n + 1], k] += gates_N[n + 1] * b1
                    out_TH[tokens_N[n + 2], k] += gates_N[n + 2] * b2
                    out_TH[tokens_N[n + 3], k] += gates_N[n + 3] * b3
            for n in range(full, end):
                a, b = _dot_1x2(act_NI, n, w_I, v_I)
                out_TH[tokens_N[n], h] += gates_N[n] * a
                if twice:
                    out_TH[tokens_N[n], k] += gates_N[n] * b


@_compiled
def add_rows(values_nH, tokens_n, gates_n, first, last, out_TH):
    """``out[tokens[n], h] += gates[n] * values[n, h]`` for h in first..last-1, the rows n in their order."""
    for n in range(values_nH.shape[0]):
        gate = gates_n[n]
        out_H, values_H = out_TH[tokens_n[n], first:last], values_nH[n, first:last]
        for h in range(last - first):
            out_H[h] += gate * values_H[h]


@_compiled
def sort_by_expert(experts_TK, counts_E, order_R, rows_TK):
    """A stable counting sort of the flat slots by expert, the empty ones (-1) last.

    Fills ``counts`` (it must be zero), ``order[row]``, the slot of a row, and ``rows[slot]``, the row of a
    slot. If ``order`` is shorter than the slots the empty ones are left out. The row of an empty slot is R.
    """
    R = order_R.shape[0]
    for e in experts_TK:
        if e >= counts_E.shape[0]:
            raise IndexError("an expert's index is not below the number of experts")
        if e >= 0:
            counts_E[e] += 1
    place_E = np.zeros(counts_E.shape[0] + 1, np.int64)
    for e in range(counts_E.shape[0]):
        place_E[e + 1] = place_E[e] + counts_E[e]
    empty = place_E[-1]
    for slot in range(experts_TK.shape[0]):
        e = experts_TK[slot]
        if e >= 0:
            row = place_E[e]
            place_E[e] += 1
            order_R[row] = slot
            rows_TK[slot] = row
        else:
            rows_TK[slot] = R
            if empty < R:
                order_R[empty] = slot
                empty += 1
