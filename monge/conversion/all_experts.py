"""Experts for the time of training: all of them on every token, as one dense product, gates applied within.

The same sum as `monge.moe.Experts`, to rounding, and the gate of every expert gets a gradient, also where it
is zero: that is what a router learns from. It computes E experts where K are needed. On a processor that is
no loss at the shares a conversion aims at: two large products of fixed shape, which the fastest kernels take
(`float32_products`), against two small ones an expert whose shapes change with every batch (SmolLM2 at 50%,
512 tokens: 3.8 CPU-seconds a step against 6.6). What is deployed computes K.

Shapes: T tokens, K slots per token, E experts, H model width, I expert width, J = 2 I when gated, else I.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monge.moe.activations import ACTIVATIONS
from monge.moe.experts import Experts


class AllExperts(nn.Module):
    """``out_t = sum_e g_te expert_e(hidden_t)`` with the weights of ``experts``; called as `Experts` are."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, H); empty slots (-1) add nothing."""
        mine = self.experts
        zeros_TE = hidden_TH.new_zeros((len(hidden_TH), mine.num_experts))
        filled_TK = torch.where(indices_TK >= 0, weights_TK, 0).to(zeros_TE.dtype)
        gates_TE = zeros_TE.scatter_add(1, indices_TK.clamp(min=0), filled_TK)
        bias_EJ = getattr(mine, mine.bias_name) if mine.bias_name else None
        proj_in_EJH = getattr(mine, mine.input_name)
        return _GatedExperts.apply(hidden_TH, gates_TE, proj_in_EJH, mine.down_proj, bias_EJ, mine.activation)


class _GatedExperts(torch.autograd.Function):
    """Saves the pre-activations alone; the rest is computed again in the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TH: Tensor,
        gates_TE: Tensor,
        proj_in_EJH: Tensor,
        down_EHI: Tensor,
        bias_EJ: Tensor | None,
        activation: str,
    ) -> Tensor:
        (T, E), J = gates_TE.shape, proj_in_EJH.shape[1]
        bias = None if bias_EJ is None else bias_EJ.flatten()
        pre_rJ = nn.functional.linear(hidden_TH, proj_in_EJH.flatten(0, 1), bias).view(T * E, J)
        act_rI = ACTIVATIONS[activation].forward(pre_rJ).mul_(gates_TE.view(-1, 1))  # r = T E rows
        ctx.activation = activation
        ctx.save_for_backward(hidden_TH, gates_TE, proj_in_EJH, down_EHI, pre_rJ)
        return nn.functional.linear(act_rI.view(T, -1), _joined(down_EHI))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, gates_TE, proj_in_EJH, down_EHI, pre_rJ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        (T, E), (_, H, I) = gates_TE.shape, down_EHI.shape
        grad_TH = grads[0].contiguous()
        grad_act_rI = (grad_TH @ _joined(down_EHI)).view(-1, I)
        backward = ACTIVATIONS[ctx.activation].backward
        grad_gates_r1, act_rI, grad_pre_rJ = backward(grad_act_rI, gates_TE.view(-1, 1), pre_rJ)
        grad_pre = grad_pre_rJ.view(T, -1)
        grad_hidden = grad_pre @ proj_in_EJH.flatten(0, 1) if needs[0] else None
        grad_in = (grad_pre.t() @ hidden_TH).view_as(proj_in_EJH) if needs[2] else None
        grad_down = (grad_TH.t() @ act_rI.view(T, -1)).view(H, E, I).transpose(0, 1) if needs[3] else None
        grad_bias = grad_pre.sum(0).view(E, -1) if needs[4] else None
        return grad_hidden, grad_gates_r1.view(T, E), grad_in, grad_down, grad_bias, None


def _joined(down_EHI: Tensor) -> Tensor:
    """(H, E I), the output projections side by side."""
    return down_EHI.transpose(0, 1).flatten(1)
