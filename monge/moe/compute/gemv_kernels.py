"""Compiled experts for few rows each, where a product is bound by reading the weights once.

Both projections keep transformers' layout, whose rows are contiguous over the summed dimension, so every
output is a dot product of two contiguous vectors (dot_kernels.py) and no weight is copied. Bfloat16 weights
are read as uint16, their bits, and so are hidden states and activations where the processor multiplies them.

The work is cut into items, which threads claim one by one: who wakes late does less, and nobody waits for a
thread that has not begun. Every output is written in one item and sums run in a fixed order: results do not
depend on the threads.

Shapes: T tokens, R rows, the filled slots sorted by expert, K slots per token, S = T K, E experts, H model
width, I expert width, J = 2 I (gated) or I; expert e has the rows starts[e]..starts[e + 1] - 1; X any width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from monge.moe.compute.dot_kernels import multiply_rows
from monge.moe.cpu_kernels import compiled, wide, write

NEURONS, FEATURES = 64, 128
"""Rows of the input and of the output projection in an item."""
ROWS = 64
"""Of an expert that meet one item's weights at a time, so that both stay in the cache."""
SPINS = 20_000
"""Looks at what the other threads have done, some 0.2 ms, before the caller should sleep."""
CLAIMED_IN, DONE_IN, CLAIMED_OUT, DONE_OUT = 0, 8, 16, 24
"""Where the counters of items lie, a cache line apart, among `COUNTERS` int64 zeros."""
COUNTERS = 32
SILU, GELU, GELU_TANH, RELU = range(4)
FUNCTIONS = {
    "swiglu": SILU,
    "geglu": GELU_TANH,
    "geglu_exact": GELU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "relu": RELU,
}
"""By the names of `monge.moe.activations.ACTIVATIONS`."""


def _atomic_add(typing_context, counters, index, value):  # type: ignore[no-untyped-def]
    """``counters[index] += value`` as one step for all threads; returns what was there before."""

    def generate(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        counters_type = signature.args[0]
        array = context.make_array(counters_type)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, counters_type, array, [args[1]])
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), generate


_add_to: Any = intrinsic(_atomic_add)


@compiled
def run_experts(
    x_TH, starts_E1, tokens_R, order_R, gates_S, proj_in_EJH, bias_EJ, proj_out_EHI, function,
    pre_RJ, act_RI, out_TH, counters,
):  # fmt: skip
    """``out_t = sum_k gates_tk expert(x_t)`` by all threads that call this with the same arguments.

    Returns False where other threads are still at their items: the caller sleeps and calls once more.

    Args:
        bias_EJ: (E, J) or (0, 0) for none. function: of `FUNCTIONS`.
        pre_RJ, act_RI, out_TH: are overwritten, whatever they hold; act has the dtype of x.
        counters: int64, `COUNTERS` zeros.
    """
    E, H, I = proj_out_EHI.shape
    parts = (I + NEURONS - 1) // NEURONS
    while True:
        item = _add_to(counters, CLAIMED_IN, 1)
        if item >= E * parts:
            break
        e, first = item // parts, item % parts * NEURONS
        begin, end = starts_E1[e], starts_E1[e + 1]
        if begin < end:
            last = min(first + NEURONS, I)
            _project_in(x_TH, tokens_R, begin, end, proj_in_EJH[e], first, last, pre_RJ)
            if proj_in_EJH.shape[1] > I:
                _project_in(x_TH, tokens_R, begin, end, proj_in_EJH[e], I + first, I + last, pre_RJ)
            _activate(pre_RJ, begin, end, bias_EJ, e, first, last, function, act_RI)
        _add_to(counters, DONE_IN, 1)
    if not _reaches(counters, DONE_IN, E * parts):
        return False
    parts = (H + FEATURES - 1) // FEATURES
    held_nH = np.empty((ROWS, FEATURES), pre_RJ.dtype)
    while True:
        item = _add_to(counters, CLAIMED_OUT, 1)
        if item >= parts:
            break
        first = item * FEATURES
        last = min(first + FEATURES, H)
        _project_out(
            act_RI, tokens_R, order_R, gates_S, starts_E1, proj_out_EHI, first, last, held_nH, out_TH
        )
        _add_to(counters, DONE_OUT, 1)
    return _reaches(counters, DONE_OUT, parts)


@compiled
def _reaches(counters, index, items):
    """Look until all items are done, but not for ever: whoever has the last one may have lost its core."""
    looks = 0
    while _add_to(counters, index, 0) < items and looks < SPINS:
        looks += 1
    return looks < SPINS


@compiled
def _project_in(x_TH, tokens_R, begin, end, weights_JH, first, last, pre_RJ):
    """``pre[n, j] = <weights[j], x[tokens[n]]>`` for j in first..last-1 and n in begin..end-1."""
    for n in range(begin, end, ROWS):
        rows = slice(n, min(n + ROWS, end))
        multiply_rows(x_TH, tokens_R[rows], weights_JH[first:last], pre_RJ[rows, first:last])


@compiled
def _activate(pre_RJ, begin, end, bias_EJ, e, first, last, function, act_RI):
    """Add the bias, then ``act = f(pre)``, gated ``f(gate) * up``, for the neurons first..last-1."""
    I = act_RI.shape[1]
    gated = pre_RJ.shape[1] > I
    for n in range(begin, end):
        pre_J, act_I = pre_RJ[n], act_RI[n]
        if len(bias_EJ):
            for i in range(first, last):
                pre_J[i] += wide(bias_EJ[e, i])
                if gated:
                    pre_J[I + i] += wide(bias_EJ[e, I + i])
        if function == SILU:  # always gated; alone in its loop it becomes vectors
            for i in range(first, last):
                write(act_I, i, pre_J[i] / (1 + _exp(-pre_J[i])) * pre_J[I + i])
        else:
            for i in range(first, last):
                up = pre_J[I + i] if gated else pre_J.dtype.type(1)
                write(act_I, i, _apply(function, pre_J[i]) * up)


@compiled
def _apply(function, x):
    if function == GELU:
        return 0.5 * x * (1 + math.erf(x * math.sqrt(0.5)))
    if function == GELU_TANH:
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.0 if x < 0 else x  # NaN stays


def _exp(x: Any) -> Any:
    """In compiled code: exp(x). Of float32 without a call, so that loops become vectors, x cut to -87..88.3.

    exp(x) = 2^n exp(r) with n whole and |r| <= ln 2 / 2, where the Taylor series to r^7 is exact to rounding.
    """
    return math.exp(x)


@overload(_exp)
def _(x):  # type: ignore[no-untyped-def]
    if x != types.float32:
        return lambda x: math.exp(x)
    highest, lowest, one, half = np.float32(88.3), np.float32(-87), np.float32(1), np.float32(0.5)
    log2e, ln2, ln2_rest = np.float32(1 / math.log(2)), np.float32(0.6931457519), np.float32(1.4286067653e-6)
    c3, c4, c5, c6, c7 = (np.float32(1 / math.factorial(n)) for n in range(3, 8))

    def fast(x):  # type: ignore[no-untyped-def]
        y = x if x < highest else highest
        y = y if y > lowest else lowest
        n = np.floor(y * log2e + half)
        r = y - n * ln2 - n * ln2_rest  # the second part of ln 2 keeps what the first cannot hold
        series = one + r * (one + r * (half + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
        return series * np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)

    return fast


@compiled
def _project_out(act_RI, tokens_R, order_R, gates_S, starts_E1, weights_EHI, first, last, held_nH, out_TH):
    """``out[t, h] = sum_n gates[order[n]] <weights[e, h], act[n]>`` for h in first..last-1, e ascending."""
    out_TH[:, first:last] = 0
    rows_n = np.arange(ROWS)
    for e in range(weights_EHI.shape[0]):
        for begin in range(starts_E1[e], starts_E1[e + 1], ROWS):
            end = min(begin + ROWS, starts_E1[e + 1])
            multiply_rows(act_RI[begin:end], rows_n[: end - begin], weights_EHI[e, first:last], held_nH)
            for n in range(begin, end):
                out_H, held_H = out_TH[tokens_R[n], first:last], held_nH[n - begin]
                gate = gates_S[order_R[n]]
                for h in range(last - first):
                    out_H[h] += gate * held_H[h]
