"""`sorted`: sort the slots by expert once, then run every expert on its contiguous rows.

One stable sort of T K small integers, one matrix product per expert and projection, and a gather-and-sum
back. The rows of one expert are gathered just before they are used, so no (N, H) copy of the hidden states is
made.

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, R rows: operator.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute.operator import differentiable, empty_gradients, sum_dtype
from monge.moe.compute.rows import expert_backward, expert_forward
from monge.moe.dispatch import Slots, combine, sort_slots


def _segments(slots: Slots) -> Iterator[tuple[int, slice]]:
    """(expert, its rows), experts with no token included. Reads the counts from the device, once."""
    start = 0
    for e, count in enumerate(slots.counts_E.tolist()):
        yield e, slice(start, start + count)
        start += count


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
    slots = sort_slots(indices_TK, proj_in_EJH.shape[0], padded=padded)
    R, H = len(slots.tokens_R), hidden_TH.shape[1]
    pre_RJ = hidden_TH.new_empty((R if keep else 0, proj_in_EJH.shape[1]))
    y_RH = hidden_TH.new_empty((R + 1, H), dtype=sum_dtype(hidden_TH, weights_TK))
    y_RH[R] = 0
    for e, rows in _segments(slots):
        if rows.start < rows.stop:
            pre = pre_RJ[rows] if keep else None
            hidden_nH = hidden_TH.index_select(0, slots.tokens_R[rows])
            bias_J = bias_EJ[e] if bias_EJ is not None else None
            y_RH[rows] = expert_forward(act, hidden_nH, proj_in_EJH[e], proj_out_EHI[e], bias_J, pre)
    return combine(y_RH, slots.rows_TK, weights_TK).to(hidden_TH.dtype), pre_RJ


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
    grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ = grads
    slots = sort_slots(indices_TK, proj_in_EJH.shape[0], padded=len(pre_RJ) == indices_TK.numel())
    R, H = len(slots.tokens_R), grad_TH.shape[1]
    weights_R = weights_TK.flatten()[slots.order_R]
    grad_weights_R = weights_R.new_empty(R + 1)
    grad_weights_R[R] = 0
    dx_RH = grad_TH.new_empty((R + 1 if needs[0] else 0, H), dtype=sum_dtype(grad_TH, weights_TK))
    dx_RH[R:] = 0
    for e, rows in _segments(slots):
        grad_in_JH = grad_in_EJH[e] if needs[2] else None
        grad_out_HI = grad_out_EHI[e] if needs[3] else None
        grad_bias_J = grad_bias_EJ[e] if needs[4] else None
        if rows.start == rows.stop:
            for grad in (grad_in_JH, grad_out_HI, grad_bias_J):
                if grad is not None:
                    grad.zero_()
            continue
        tokens = slots.tokens_R[rows]
        dx, grad_weights_R[rows] = expert_backward(
            act,
            grad_TH.index_select(0, tokens),
            hidden_TH.index_select(0, tokens) if hidden_TH is not None else None,
            weights_R[rows],
            pre_RJ[rows],
            proj_in_EJH[e],
            proj_out_EHI[e],
            grad_in_JH,
            grad_out_HI,
            grad_bias_J,
            needs[0],
        )
        if dx is not None:
            dx_RH[rows] = dx
    if needs[0]:
        grad_hidden_TH = combine(dx_RH, slots.rows_TK).to(grad_TH.dtype)
    if needs[1]:
        grad_weights_TK = grad_weights_R[slots.rows_TK]
    return grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ


sorted_by_expert = differentiable("sorted", _forward, _backward)
