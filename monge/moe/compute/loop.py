"""`loop`: find the slots of every chosen expert and run it on them. The reference, as simple as it can be.

Nothing is sorted; each expert costs one comparison with all T K slots, and the slot outputs take T K H floats
for the moment of the sum.

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, R rows: operator.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute.operator import differentiable, empty_gradients, sum_dtype
from monge.moe.compute.rows import expert_backward, expert_forward


def _chosen(indices_TK: Tensor) -> Iterator[tuple[int, Tensor, Tensor, slice]]:
    """(expert, its tokens, their slots, its rows among the pre-activations), experts in ascending order."""
    start = 0
    for e in torch.unique(indices_TK).tolist():
        if e >= 0:
            tokens, slots = torch.where(indices_TK == e)
            yield e, tokens, slots, slice(start, start + len(tokens))
            start += len(tokens)


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
    act = ACTIVATIONS[activation]
    rows = (indices_TK.numel() if padded else int((indices_TK >= 0).sum())) if keep else 0
    pre_RJ = hidden_TH.new_empty((rows, proj_in_EJH.shape[1]))
    slots_TKH = hidden_TH.new_zeros(
        (*indices_TK.shape, hidden_TH.shape[1]), dtype=sum_dtype(hidden_TH, weights_TK)
    )
    for e, tokens, slots, rows_e in _chosen(indices_TK):
        pre = pre_RJ[rows_e] if keep else None
        bias_J = bias_EJ[e] if bias_EJ is not None else None
        y = expert_forward(act, hidden_TH[tokens], proj_in_EJH[e], proj_out_EHI[e], bias_J, pre)
        slots_TKH[tokens, slots] = y.to(slots_TKH.dtype)
    out_TH = (slots_TKH * weights_TK[:, :, None]).sum(dim=1).to(hidden_TH.dtype)
    return out_TH, pre_RJ


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
    act = ACTIVATIONS[activation]
    grads = empty_gradients(grad_TH, weights_TK, proj_in_EJH, proj_out_EHI, needs)
    grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ = (g.zero_() for g in grads)
    slots_TKH = grad_TH.new_zeros((*indices_TK.shape, grad_TH.shape[1]), dtype=sum_dtype(grad_TH, weights_TK))
    for e, tokens, slots, rows_e in _chosen(indices_TK):
        rows_nH = grad_TH.new_empty((len(tokens), grad_TH.shape[1])) if needs[0] else None
        grad_gates = expert_backward(
            act,
            grad_TH[tokens],
            hidden_TH[tokens] if hidden_TH is not None else None,
            weights_TK[tokens, slots],
            pre_RJ[rows_e],
            proj_in_EJH[e],
            proj_out_EHI[e],
            grad_in_EJH[e] if needs[2] else None,
            grad_out_EHI[e] if needs[3] else None,
            grad_bias_EJ[e] if needs[4] else None,
            rows_nH,
        )
        if rows_nH is not None:
            slots_TKH[tokens, slots] = rows_nH.to(slots_TKH.dtype)
        if needs[1]:
            grad_weights_TK[tokens, slots] = grad_gates.to(grad_weights_TK.dtype)
    if needs[0]:
        grad_hidden_TH = slots_TKH.sum(dim=1).to(grad_TH.dtype)
    return grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ


loop = differentiable("loop", _forward, _backward)
