"""The non-linearities of experts in compiled loops, forward within `gemv` and backward within every path.

Shapes: n rows of an expert, I its neurons, m those at work, J = 2 I (gated) or I.
"""

from __future__ import annotations

import math

from monge.moe.cpu_kernels import AHEAD, compiled, prefetch, wide, write
from monge.moe.swiglu_kernels import swiglu, swiglu_gradients

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
        gate_m, up_m, act_m = gate_nm[n], up_nm[n], act_nI[n, first:last]
        if len(bias_J):
            _add(bias_J[first:last], gate_m)
            if gated:
                _add(bias_J[I + first : I + last], up_m)
        if function == SILU:  # always gated
            swiglu(gate_nm, up_nm, n, first, m_last, act_nI, pre_nJ)
            continue
        prefetch(act_nI, n + AHEAD, first, last)
        prefetch(pre_nJ, n + AHEAD, first, last)
        if gated:
            prefetch(pre_nJ, n + AHEAD, I + first, I + last)
        if len(pre_nJ):
            _keep(gate_m, pre_nJ[n, first:last])
            if gated:
                _keep(up_m, pre_nJ[n, I + first : I + last])
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


@compiled
def swiglu_backward(weights_n, pre_nJ, grad_nm, first, last, act_nI, grad_pre_nJ, grad_weights_n):
    """`Activation.backward` of ``sum_n weights_n <grad_n, silu(gate_n) up_n>`` for the neurons first..last-1.

    ``act`` becomes ``weights silu(gate) up``; what these neurons add to the gradient of the weights is added
    there. All but the weights may be uint16, the bits of bfloat16.
    """
    for n in range(len(act_nI)):
        row = weights_n[n], pre_nJ, grad_nm, n, first, last - first, act_nI, grad_pre_nJ
        grad_weights_n[n] += swiglu_gradients(*row)


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
