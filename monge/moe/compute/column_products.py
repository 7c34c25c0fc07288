"""The gradients of an expert with many rows: products along columns, by compiled panels.

In the forward pass hidden states meet rows of the weights, in the backward columns, and rows of hidden states
one another. Panels are ahead of the libraries there with AVX-512, above all where weights and their gradients
come from memory: what is next is asked for while the processor multiplies (docs/performance.md). The gradient
of the activations is never written: SiLU is differentiated while it is in the cache.

A thread that has the expert to itself computes them ``alone``; otherwise all threads take panels. Every sum
has the same order either way: results do not depend on the threads.

Shapes: n rows of the expert, H model width, I expert width, J = 2 I, m neurons at work, P parts of them,
X by M any matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from monge.moe.activation_kernels import swiglu_backward
from monge.moe.compute import precision
from monge.moe.compute.outer_kernels import LEFT, multiply_outer
from monge.moe.compute.packing_kernels import WIDTH
from monge.moe.compute.row_products import PANEL_ROWS, multiply_columns
from monge.moe.cpu_kernels import as_array, compiled, empty_lines
from monge.moe.vectors import MANY_REGISTERS, MULTIPLIES_BFLOAT16
from monge.ot.threads import run_all, split

NEURONS = 128


def fit(
    grad_nH: Tensor,
    gates_n: Tensor,
    weights: Sequence[Tensor],
    grad_weights: Sequence[Tensor | None],
    grad_hidden_nH: Tensor | None,
) -> bool:
    """Whether the gradients of an expert with these rows and weights are faster here than by torch."""
    dtype = grad_nH.dtype
    narrow = MULTIPLIES_BFLOAT16 and not precision.has_tiles()
    fast = {torch.float32: MANY_REGISTERS, torch.bfloat16: narrow}.get(dtype, False)
    given = [grad_nH, *weights, *(grad for grad in grad_weights if grad is not None)]
    same = all(x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous() for x in given)
    words = dtype == torch.float32 or all(len(matrix) % 2 == 0 for matrix in weights)
    sums = {x.dtype for x in (gates_n, grad_hidden_nH) if x is not None} == {torch.float32}
    return fast and same and words and sums and len(grad_nH) >= PANEL_ROWS


def multiply(rows_nX: Tensor, weights_XM: Tensor, out_nM: Tensor, alone: bool) -> None:
    """``out = rows weights``, in float32."""
    rows, weights, out = map(as_array, (rows_nX, weights_XM, out_nM))
    _run(lambda ends: _multiply(rows, weights, *ends, out), out.shape[1], WIDTH, alone)


def outer(a_nX: Tensor, b_nY: Tensor, out_XY: Tensor, alone: bool) -> None:
    """``out = a^T b``; all of one dtype."""
    a, b, out = map(as_array, (a_nX, b_nY, out_XY))
    _run(lambda ends: multiply_outer(a, b, *ends, out), len(out), LEFT, alone)


def through_swiglu(
    grad_nH: Tensor, proj_out_HI: Tensor, weights_n: Tensor, pre_nJ: Tensor, ahead_JH: Tensor, alone: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`Activation.backward` of SwiGLU for the gradient ``grad proj_out`` of its output.

    Args:
        weights_n: float32.
        ahead_JH: the weights whose columns are needed next.
    """
    n, J = pre_nJ.shape
    act_nI, grad_pre_nJ = grad_nH.new_empty((n, J // 2)), grad_nH.new_empty((n, J))
    grad_weights_Pn = weights_n.new_zeros((_parts(J // 2, NEURONS), n))
    tensors = (grad_nH, proj_out_HI, weights_n, pre_nJ, ahead_JH, act_nI, grad_pre_nJ, grad_weights_Pn)
    arrays = [as_array(tensor) for tensor in tensors]
    _run(lambda ends: _through_swiglu(*ends, *arrays), J // 2, NEURONS, alone)
    return grad_weights_Pn.sum(dim=0)[:, None], act_nI, grad_pre_nJ


def _run(work: Callable[[tuple[int, int]], None], length: int, step: int, alone: bool) -> None:
    """``work`` on ``range(length)`` in pieces of whole steps, on this thread ``alone`` or on all."""
    steps = split(_parts(length, step), 1 if alone else torch.get_num_threads())
    run_all(work, [(first * step, min(last * step, length)) for first, last in steps])


def _parts(length: int, step: int) -> int:
    return (length + step - 1) // step


@compiled
def _multiply(rows_nX, weights_XM, first, last, out_nM):
    multiply_columns(rows_nX, weights_XM, first, last, out_nM[:, first:last], weights_XM[:, :WIDTH])


@compiled
def _through_swiglu(
    begin, end, grad_nH, proj_out_HI, weights_n, pre_nJ, ahead_JH, act_nI, grad_pre_nJ, grad_weights_Pn
):  # fmt: skip
    grad_nm = empty_lines(len(grad_nH), NEURONS, np.float32)
    for first in range(begin, end, NEURONS):
        last, grad_weights_n = min(first + NEURONS, end), grad_weights_Pn[first // NEURONS]
        multiply_columns(grad_nH, proj_out_HI, first, last, grad_nm, ahead_JH[:, :WIDTH])
        swiglu_backward(weights_n, pre_nJ, grad_nm, first, last, act_nI, grad_pre_nJ, grad_weights_n)
