"""One expert on the rows it received: what `loop` and `sorted` do for every expert.

Hidden states and projections have one dtype, in which the products run; what is kept for the backward and the
gradients of the projections may have a narrower one (precision.py).

Shapes: n rows of this expert, H model width, I expert width, J = 2 I (gated) or I.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, mm

from monge.moe.activations import Activation
from monge.moe.compute import column_products as columns


def mm_into(out: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, written to ``out`` if there is one, in its dtype; the result in the dtype of the factors."""
    if out is None or out.dtype == a.dtype:
        return mm(a, b, out=out)
    product = mm(a, b)
    out.copy_(product)
    return product


def expert_forward(
    activation: Activation,
    hidden_nH: Tensor,
    proj_in_JH: Tensor,
    proj_out_HI: Tensor,
    bias_J: Tensor | None,
    pre_nJ: Tensor | None,
    out_nH: Tensor | None = None,
) -> Tensor:
    """(n, H), written to ``out_nH`` too; the pre-activations are written to ``pre_nJ``."""
    # a bias is added before the pre-activations are rounded
    same = pre_nJ is not None and pre_nJ.dtype == hidden_nH.dtype
    sums_nJ = mm(hidden_nH, proj_in_JH.t(), out=pre_nJ if same else None)
    if bias_J is not None:
        sums_nJ += bias_J
    if pre_nJ is not None and not same:
        pre_nJ.copy_(sums_nJ)
    return mm_into(out_nH, activation.forward(sums_nJ), proj_out_HI.t())


def expert_backward(
    activation: Activation,
    grad_nH: Tensor,
    hidden_nH: Tensor | None,
    weights_n: Tensor,
    pre_nJ: Tensor,
    proj_in_JH: Tensor,
    proj_out_HI: Tensor,
    grad_in_JH: Tensor | None,
    grad_out_HI: Tensor | None,
    grad_bias_J: Tensor | None,
    grad_hidden_nH: Tensor | None,
    alone: bool = False,
) -> Tensor:
    """Gradients of sum_n weights_n <grad_n, expert(hidden_n)>; returns that of the weights, (n,).

    Those of the projections, the bias and the rows are written to the other ``grad_`` arguments where there
    are any. The output y = act Wd^T is not needed: <grad, y> = <grad Wd, act>. ``alone``: this thread has the
    expert to itself.
    """
    weights, written = (proj_out_HI, proj_in_JH), (grad_in_JH, grad_out_HI)
    panels = columns.fit(grad_nH, weights_n, weights, written, grad_hidden_nH)
    multiply, outer = (columns.multiply, columns.outer) if panels else (_multiply, _outer)
    if panels and activation.function is F.silu:
        grad_weights_n1, weighted_nI, grad_pre_nJ = columns.through_swiglu(
            grad_nH, proj_out_HI, weights_n, pre_nJ, proj_in_JH, alone
        )
    else:
        grad_act_nI = mm(grad_nH, proj_out_HI)
        grad_weights_n1, weighted_nI, grad_pre_nJ = activation.backward(
            grad_act_nI, weights_n[:, None], pre_nJ.to(grad_nH.dtype)
        )
    if grad_out_HI is not None:
        outer(grad_nH, weighted_nI, grad_out_HI, alone)
    if grad_in_JH is not None:
        assert hidden_nH is not None
        outer(grad_pre_nJ, hidden_nH, grad_in_JH, alone)
    if grad_bias_J is not None:
        grad_bias_J.copy_(torch.sum(grad_pre_nJ, dim=0))
    if grad_hidden_nH is not None:
        multiply(grad_pre_nJ, proj_in_JH, grad_hidden_nH, alone)
    return grad_weights_n1.squeeze(1)


def _multiply(a_nX: Tensor, b_XM: Tensor, out_nM: Tensor, alone: bool) -> None:
    mm_into(out_nM, a_nX, b_XM)


def _outer(a_nX: Tensor, b_nY: Tensor, out_XY: Tensor, alone: bool) -> None:
    mm_into(out_XY, a_nX.t(), b_nY)
