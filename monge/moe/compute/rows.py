"""One expert on the rows it received: what `loop` and `sorted` do for every expert.

Shapes: n rows of this expert, H model width, I expert width, J = 2 I (gated) or I.
"""

from __future__ import annotations

import torch
from torch import Tensor, mm

from monge.moe.activations import Activation


def expert_forward(
    activation: Activation,
    hidden_nH: Tensor,
    proj_in_JH: Tensor,
    proj_out_HI: Tensor,
    bias_J: Tensor | None,
    pre_nJ: Tensor | None,
) -> Tensor:
    """(n, H); the pre-activations are written to ``pre_nJ`` when there is one."""
    pre_nJ = mm(hidden_nH, proj_in_JH.t(), out=pre_nJ)
    if bias_J is not None:
        pre_nJ += bias_J
    return mm(activation.forward(pre_nJ), proj_out_HI.t())


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
    needs_hidden: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of sum_n weights_n <grad_n, expert(hidden_n)> for the rows (n, H) and the weights (n,).

    Those of the projections and the bias are written to ``grad_in_JH``, ``grad_out_HI`` and ``grad_bias_J``
    when there are any. The output y = act Wd^T is not needed: <grad, y> = <grad Wd, act>.
    """
    grad_act_nI = mm(grad_nH, proj_out_HI)
    grad_weights_n1, weighted_nI, grad_pre_nJ = activation.backward(grad_act_nI, weights_n[:, None], pre_nJ)
    if grad_out_HI is not None:
        mm(grad_nH.t(), weighted_nI, out=grad_out_HI)
    if grad_in_JH is not None:
        assert hidden_nH is not None
        mm(grad_pre_nJ.t(), hidden_nH, out=grad_in_JH)
    if grad_bias_J is not None:
        torch.sum(grad_pre_nJ, dim=0, out=grad_bias_J)
    return (mm(grad_pre_nJ, proj_in_JH) if needs_hidden else None), grad_weights_n1.squeeze(1)
