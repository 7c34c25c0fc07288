"""The non-linearities of experts in compiled loops, forward within `gemv` and backward within every path.

Shapes: n rows of an expert, I its neurons, m those at work, J = 2 I (gated) or I.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from monge.moe.cpu_kernels import compiled, prefetch, wide, write

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
AHEAD = 8
"""Rows: memory of the row that is so many further on is asked for, since a part of a row is over too soon."""


@compiled
def activate(gate_nm, up_nm, bias_J, first, last, function, act_nI, pre_nJ):
    """``act = f(gate + bias)``, gated ``f(gate + bias) * (up + bias)``, for the neurons first..last-1.

    Args:
        gate_nm, up_nm: may have further rows and columns; the biases are added to them.
        bias_J: (J,), or (0,) for none. function: of `FUNCTIONS`.
        act_nI, pre_nJ: are written to; both may be uint16, the bits of bfloat16; pre (0, J) keeps nothing.
    """
    I, m_last, one = act_nI.shape[1], last - first, gate_nm.dtype.type(1)
    gated = pre_nJ.shape[1] > I
    for n in range(len(act_nI)):
        prefetch(act_nI, n + AHEAD, first, last)
        prefetch(pre_nJ, n + AHEAD, first, last)
        if gated:
            prefetch(pre_nJ, n + AHEAD, I + first, I + last)
        gate_m, up_m, act_m = gate_nm[n], up_nm[n], act_nI[n, first:last]
        if len(bias_J):
            _add(bias_J[first:last], gate_m)
            if gated:
                _add(bias_J[I + first : I + last], up_m)
        if len(pre_nJ):
            _keep(gate_m, pre_nJ[n, first:last])
            if gated:
                _keep(up_m, pre_nJ[n, I + first : I + last])
        if function == SILU:  # always gated; alone in its loop it becomes vectors
            for m in range(m_last):
                write(act_m, m, gate_m[m] / (one + _exp(-gate_m[m])) * up_m[m])
        else:
            for m in range(m_last):
                write(act_m, m, _apply(function, gate_m[m]) * (up_m[m] if gated else one))


@compiled
def _add(bias_m, sums_m):
    for m in range(len(bias_m)):
        sums_m[m] += wide(bias_m[m])


@compiled
def _keep(sums_m, pre_m):
    for m in range(len(pre_m)):
        write(pre_m, m, sums_m[m])


@compiled
def _apply(function, x):
    if function == GELU:
        return 0.5 * x * (1 + math.erf(x * math.sqrt(0.5)))
    if function == GELU_TANH:
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.0 if x < 0 else x  # NaN stays


def _exp(x: Any) -> Any:
    """In compiled code: exp(x). Of float32 without a call, so that loops become vectors, x at least -87.

    exp(x) = 2^n exp(r) with n whole and |r| <= ln 2 / 2, where the Taylor series to r^7 is exact to rounding.
    From n = 128 on, x above 88.4, it is infinite; also of NaN.
    """
    return math.exp(x)


@overload(_exp)
def _(x):  # type: ignore[no-untyped-def]
    if x != types.float32:
        return lambda x: math.exp(x)
    highest, lowest, one, half = np.float32(89), np.float32(-87), np.float32(1), np.float32(0.5)
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
def swiglu_backward(weights_n, pre_nJ, grad_nm, first, last, act_nI, grad_pre_nJ, grad_weights_n):
    """`Activation.backward` of ``sum_n weights_n <grad_n, silu(gate_n) up_n>`` for the neurons first..last-1.

    ``act`` becomes ``weights silu(gate) up``; what these neurons add to the gradient of the weights is added
    there. All but the weights may be uint16, the bits of bfloat16. Every loop is of few arrays: with more the
    compiler finds no vectors.
    """
    I, m_last, one = act_nI.shape[1], last - first, weights_n.dtype.type(1)
    silu_m, slope_m = np.empty(m_last, weights_n.dtype), np.empty(m_last, weights_n.dtype)
    for n in range(len(act_nI)):
        prefetch(act_nI, n + AHEAD, first, last)
        for begin in (first, I + first):
            prefetch(pre_nJ, n + AHEAD, begin, begin + m_last)
            prefetch(grad_pre_nJ, n + AHEAD, begin, begin + m_last)
        weight, grad_m, act_m = weights_n[n], grad_nm[n], act_nI[n, first:last]
        gate_m, up_m = pre_nJ[n, first:last], pre_nJ[n, I + first : I + last]
        grad_gate_m, grad_up_m = grad_pre_nJ[n, first:last], grad_pre_nJ[n, I + first : I + last]
        for m in range(m_last):
            gate = wide(gate_m[m])
            sigmoid = one / (one + _exp(-gate))
            silu_m[m] = gate * sigmoid
            slope_m[m] = sigmoid + gate * sigmoid * (one - sigmoid)
        total = grad_weights_n.dtype.type(0)
        for m in range(m_last):
            product = wide(grad_m[m]) * silu_m[m]
            total += product * wide(up_m[m])
            write(grad_up_m, m, weight * product)
        for m in range(m_last):
            write(act_m, m, weight * silu_m[m] * wide(up_m[m]))
        for m in range(m_last):
            write(grad_gate_m, m, weight * wide(grad_m[m]) * wide(up_m[m]) * slope_m[m])
        grad_weights_n[n] += total


@compiled
def gated_backward(weights_n, pre_nJ, act_nI, grad_nI, grad_pre_nJ, grad_weights_n):
    """`Activation.backward` of ``sum_n weights_n <grad_n, act_n up_n>``, but for the activation's derivative.

    ``up`` is the second half of ``pre``. The second half of ``grad_pre`` becomes ``weights grad act``, and in
    place ``act`` becomes ``weights act up`` and ``grad`` becomes ``weights grad up``. The four may be uint16,
    the bits of bfloat16.
    """
    I = act_nI.shape[1]
    for n in range(act_nI.shape[0]):
        weight = weights_n[n]
        up_I, act_I, grad_I, grad_up_I = pre_nJ[n, I:], act_nI[n], grad_nI[n], grad_pre_nJ[n, I:]
        total = grad_weights_n.dtype.type(0)
        for i in range(I):  # two loops: with three outputs in one the compiler finds no vectors
            product = wide(grad_I[i]) * wide(act_I[i])
            total += product * wide(up_I[i])
            write(grad_up_I, i, weight * product)
        for i in range(I):
            scale = weight * wide(up_I[i])
            write(act_I, i, scale * wide(act_I[i]))
            write(grad_I, i, scale * wide(grad_I[i]))
        grad_weights_n[n] = total
