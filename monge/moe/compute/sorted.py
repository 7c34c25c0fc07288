"""`sorted`: sort the slots by expert once, then run every expert on its contiguous rows.

One stable sort of T K small integers and one matrix product per expert and projection. The rows of one expert
are gathered just before they are used and summed into their tokens soon after, so there is no (N, H) copy of
the hidden states, and on the CPU none of the outputs; there threads have experts of their own (spreading.py).

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, R rows: operator.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute.float32_products import fast_float32
from monge.moe.compute.memory import empty, gradient
from monge.moe.compute.operator import differentiable, empty_gradients, sum_dtype
from monge.moe.compute.precision import matrices, product_dtype
from monge.moe.compute.rows import expert_backward, expert_forward
from monge.moe.compute.slot_sum import SlotSum
from monge.moe.compute.spreading import Run, run_experts
from monge.moe.dispatch import Slots, sort_slots
from monge.moe.vectors import MANY_REGISTERS


def _gatherer(x_TX: Tensor, slots: Slots) -> Callable[[slice], Tensor]:
    """A function from rows to the (n, X) of their tokens, in a buffer that lasts until the next call."""
    largest = int(slots.counts_E.max()) if len(slots.tokens_R) else 0
    buffer_nX = empty(x_TX, (largest, x_TX.shape[1]))

    def gather(rows: slice) -> Tensor:
        out_nX = buffer_nX[: rows.stop - rows.start]
        return torch.index_select(x_TX, 0, slots.tokens_R[rows], out=out_nX)

    return gather


def _training_products(x: Tensor) -> AbstractContextManager[None]:
    """oneDNN's for float32 with AVX-512, where they are faster: a step's shapes come again in others."""
    fast = MANY_REGISTERS and x.device.type == "cpu" and x.dtype == torch.float32
    return fast_float32() if fast else nullcontext()


def forward(
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
    """See `differentiable`."""
    act = ACTIVATIONS[activation]
    slots = sort_slots(indices_TK, proj_in_EJH.shape[0], padded=padded)
    pre_RJ = empty(hidden_TH, (len(slots.tokens_R) if keep else 0, proj_in_EJH.shape[1]))
    slot_sum = SlotSum(slots, hidden_TH, sum_dtype(hidden_TH, weights_TK), weights_TK, proj_in_EJH)
    dtype = product_dtype(hidden_TH.dtype, hidden_TH.device)
    hidden_TH = hidden_TH.to(dtype)

    def make() -> Run:
        proj_in, proj_out = matrices(proj_in_EJH, dtype), matrices(proj_out_EHI, dtype)
        hidden = _gatherer(hidden_TH, slots)

        def run(e: int, rows: slice, out_nH: Tensor | None, alone: bool) -> None:
            if rows.start < rows.stop:
                bias_J = bias_EJ[e] if bias_EJ is not None else None
                pre_nJ = pre_RJ[rows] if keep else None
                expert_forward(act, hidden(rows), proj_in(e), proj_out(e), bias_J, pre_nJ, out_nH)

        return run

    with _training_products(hidden_TH) if keep else nullcontext():
        run_experts(slots, slot_sum, make)
    return slot_sum.total(), pre_RJ


def backward(
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
    """See `differentiable`."""
    act = ACTIVATIONS[activation]
    grads = empty_gradients(grad_TH, weights_TK, proj_in_EJH, proj_out_EHI, [False, *needs[1:]], gradient)
    grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ = grads
    slots = sort_slots(indices_TK, proj_in_EJH.shape[0], padded=len(pre_RJ) == indices_TK.numel())
    R = len(slots.tokens_R)
    weights_R = weights_TK.flatten()[slots.order_R]
    grad_weights_R = weights_R.new_empty(R + 1)
    grad_weights_R[R] = 0
    dtype = sum_dtype(grad_TH, weights_TK)
    slot_sum = SlotSum(slots, grad_TH, dtype, owner=proj_in_EJH) if needs[0] else None
    dtype = product_dtype(grad_TH.dtype, grad_TH.device)
    grad_TH = grad_TH.to(dtype)
    hidden_TH = hidden_TH.to(dtype) if hidden_TH is not None else None

    def make() -> Run:
        proj_in, proj_out = matrices(proj_in_EJH, dtype), matrices(proj_out_EHI, dtype)
        dy = _gatherer(grad_TH, slots)
        hidden = _gatherer(hidden_TH, slots) if hidden_TH is not None else None

        def run(e: int, rows: slice, grad_hidden_nH: Tensor | None, alone: bool) -> None:
            grad_in_JH = grad_in_EJH[e] if needs[2] else None
            grad_out_HI = grad_out_EHI[e] if needs[3] else None
            grad_bias_J = grad_bias_EJ[e] if needs[4] else None
            if rows.start == rows.stop:
                for grad in (grad_in_JH, grad_out_HI, grad_bias_J):
                    if grad is not None:
                        grad.zero_()
                return
            grad_weights_R[rows] = expert_backward(
                act,
                dy(rows),
                hidden(rows) if hidden is not None else None,
                weights_R[rows],
                pre_RJ[rows],
                proj_in(e),
                proj_out(e),
                grad_in_JH,
                grad_out_HI,
                grad_bias_J,
                grad_hidden_nH,
                alone,
            )

        return run

    with _training_products(grad_TH):
        run_experts(slots, slot_sum, make)
    if slot_sum is not None:
        grad_hidden_TH = slot_sum.total()
    if needs[1]:
        grad_weights_TK = grad_weights_R[slots.rows_TK]
    return grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ


sorted_by_expert = differentiable("sorted", forward, backward)
