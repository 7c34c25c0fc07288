"""`masked`: every expert on every token, in batched products, and what was not chosen is masked.

E / K times the multiply-adds that are needed, without a sort, a gather or anything read from the device. On
an accelerator a layer of few tokens is a queue of kernels that each take less time than their launch: there
the fewest kernels win.

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, R = E T rows, expert 0's
tokens first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute.operator import differentiable, empty_gradients


def _by_expert(indices_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The gate of every expert at every token (R, 1), 0 where it is not chosen; where it is not (R, 1)."""
    if indices_TK.device.type == "cpu" and (indices_TK >= num_experts).any():  # not read from a device
        raise IndexError("an expert's index is not below the number of experts")
    expert_E = torch.arange(num_experts, device=indices_TK.device)
    hit_EKT = expert_E[:, None, None] == indices_TK.T
    gates_ET = torch.where(hit_EKT, weights_TK.T, 0).sum(1)
    return gates_ET.view(-1, 1), hit_EKT.any(1).logical_not_().view(-1, 1)


def _total(x_ETX: Tensor, w_EXH: Tensor) -> Tensor:
    """(T, H): the sum over the experts of ``x_e w_e``, by the cheaper of two ways."""
    E, T, X = x_ETX.shape
    if T < X:  # writes E T H products; the other way copies E X H weights where they are transposed
        return torch.bmm(x_ETX, w_EXH).sum(0)
    return x_ETX.transpose(0, 1).reshape(T, E * X) @ w_EXH.reshape(E * X, -1)


def _forward(
    hidden_TH: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    proj_in_EJH: Tensor,
    proj_out_EHI: Tensor,
    activation: str,
    keep: bool,
    padded: bool,
    bias_EJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (E, J, _), T, I = proj_in_EJH.shape, len(hidden_TH), proj_out_EHI.shape[2]
    gates_R1, unchosen_R1 = _by_expert(indices_TK, weights_TK, E)
    pre_ETJ = torch.bmm(hidden_TH.expand(E, -1, -1), proj_in_EJH.mT)
    if bias_EJ is not None:
        pre_ETJ += bias_EJ[:, None]
    pre_RJ = pre_ETJ.flatten(0, 1)
    # not by the gate alone: what overflows where nobody looks must not become NaN
    act_RI = ACTIVATIONS[activation].forward(pre_RJ).mul_(gates_R1).masked_fill_(unchosen_R1, 0)
    out_TH = _total(act_RI.view(E, T, I), proj_out_EHI.mT)
    return out_TH, pre_RJ if keep else pre_RJ.new_empty((0, J))


def _backward(
    grad_TH: Tensor,
    hidden_TH: Tensor | None,
    indices_TK: Tensor,
    weights_TK: Tensor,
    proj_in_EJH: Tensor,
    proj_out_EHI: Tensor,
    pre_RJ: Tensor,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = empty_gradients(grad_TH, weights_TK, proj_in_EJH, proj_out_EHI, [False] * 5)
    grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ = grads
    (E, J, _), T, I = proj_in_EJH.shape, len(grad_TH), proj_out_EHI.shape[2]
    gates_R1, unchosen_R1 = _by_expert(indices_TK, weights_TK, E)
    grad_ETH = grad_TH.expand(E, -1, -1)
    grad_act_RI = torch.bmm(grad_ETH, proj_out_EHI).flatten(0, 1)
    grad_gates_R1, weighted_RI, grad_pre_RJ = ACTIVATIONS[activation].backward(grad_act_RI, gates_R1, pre_RJ)
    weighted_ETI = weighted_RI.masked_fill_(unchosen_R1, 0).view(E, T, I)
    grad_pre_ETJ = grad_pre_RJ.masked_fill_(unchosen_R1, 0).view(E, T, J)
    if needs[1]:
        grad_weights_TK = grad_gates_R1.view(E, T).T.gather(1, indices_TK.clamp_min(0))
        grad_weights_TK = grad_weights_TK.masked_fill_(indices_TK < 0, 0)
    if needs[3]:
        grad_out_EHI = torch.bmm(grad_ETH.mT, weighted_ETI)
    if needs[2]:
        assert hidden_TH is not None
        grad_in_EJH = torch.bmm(grad_pre_ETJ.mT, hidden_TH.expand(E, -1, -1))
    if needs[4]:
        grad_bias_EJ = grad_pre_ETJ.sum(1)
    if needs[0]:
        grad_hidden_TH = _total(grad_pre_ETJ, proj_in_EJH)
    return grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ


masked = differentiable("masked", _forward, _backward, reads_sizes=False, rows=lambda T, K, E: T * E)
