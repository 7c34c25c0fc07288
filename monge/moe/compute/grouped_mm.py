"""`grouped_mm`: sort the slots by expert, then one grouped matrix product per projection for all experts.

On an accelerator nothing is read from the device: the kernel takes the group boundaries as a tensor, and the
rows are T K whatever the number of filled slots. torch's kernel takes bfloat16 on CUDA (compute capability
8.0 on), float32, bfloat16 and float16 on the CPU, and rows of a multiple of 16 bytes; anything else (float64,
odd widths) goes group by group through plain products, with the same result.

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, R rows: operator.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute.operator import differentiable, empty_gradients, sum_dtype
from monge.moe.dispatch import Slots, combine, sort_slots

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch 2.9 has the private name only
_KERNEL = getattr(F, "grouped_mm", None) or torch._grouped_mm


def kernel_takes(*matrices: Tensor) -> bool:
    """Whether torch's grouped kernel runs on these contiguous matrices (dtype, device, 16-byte rows)."""
    a = matrices[0]
    if a.device.type == "cuda":
        supported = a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(a.device) >= (8, 0)
    else:
        supported = a.device.type == "cpu" and a.dtype in _CPU_DTYPES
    return supported and all(
        m.dtype == a.dtype
        and m.is_contiguous()
        and m.shape[-1] * m.itemsize % 16 == 0
        and m.data_ptr() % 16 == 0
        for m in matrices
    )


def _product(x_RX: Tensor, w_EXY: Tensor, ends_E: Tensor, kernel: bool) -> Tensor:
    """(R, Y): rows of group e times ``w[e]``. Rows after the last group are undefined."""
    if kernel:
        return _KERNEL(x_RX, w_EXY, offs=ends_E)
    out_RY = x_RX.new_empty((len(x_RX), w_EXY.shape[2]))
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        torch.mm(x_RX[start:end], w_EXY[e], out=out_RY[start:end])
        start = end
    return out_RY


def _outer_product(a_RX: Tensor, b_RY: Tensor, ends_E: Tensor, kernel: bool) -> Tensor:
    """(E, X, Y): for every group the sum over its rows of the outer products of ``a`` and ``b``."""
    if kernel:
        out_EXY = _KERNEL(a_RX.t(), b_RY, offs=ends_E)
        # a group of no rows is a sum of nothing, which an accelerator's kernel may leave unwritten
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        return out_EXY if out_EXY.device.type == "cpu" else out_EXY.masked_fill_(empty_E[:, None, None], 0)
    out_EXY = a_RX.new_empty((len(ends_E), a_RX.shape[1], b_RY.shape[1]))
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        torch.mm(a_RX[start:end].t(), b_RY[start:end], out=out_EXY[e])
        start = end
    return out_EXY


def _boundaries(slots: Slots) -> Tensor:
    """(E,) int32, the end of every expert's rows."""
    return slots.starts_E1[1:].to(torch.int32)


def _with_zero_row(x_RH: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` and one more row, of zeros, which stands for the empty slots."""
    out = x_RH.new_empty((len(x_RH) + 1, x_RH.shape[1]), dtype=dtype)
    out[:-1] = x_RH
    out[-1] = 0
    return out


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
    ends_E = _boundaries(slots)
    kernel = kernel_takes(hidden_TH, proj_in_EJH, proj_out_EHI)
    x_RH = hidden_TH.index_select(0, slots.tokens_R)
    pre_RJ = _product(x_RH, proj_in_EJH.mT, ends_E, kernel)
    del x_RH
    if bias_EJ is not None:
        # an empty slot has no expert: any bias will do, nothing is read from its row
        experts_R = indices_TK.flatten()[slots.order_R].clamp_min(0)
        pre_RJ += bias_EJ.index_select(0, experts_R)
    y_RH = _product(act.forward(pre_RJ), proj_out_EHI.mT, ends_E, kernel)
    y_RH = _with_zero_row(y_RH, sum_dtype(hidden_TH, weights_TK))
    out_TH = combine(y_RH, slots.rows_TK, weights_TK).to(hidden_TH.dtype)
    return out_TH, pre_RJ if keep else pre_RJ.new_empty((0, pre_RJ.shape[1]))


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
    grads = empty_gradients(grad_TH, weights_TK, proj_in_EJH, proj_out_EHI, [False] * 5)
    grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ = grads
    slots = sort_slots(indices_TK, proj_in_EJH.shape[0], padded=len(pre_RJ) == indices_TK.numel())
    ends_E = _boundaries(slots)
    kernel = kernel_takes(grad_TH, proj_in_EJH, proj_out_EHI)
    weights_R1 = weights_TK.flatten()[slots.order_R][:, None]
    grad_RH = grad_TH.index_select(0, slots.tokens_R)
    grad_act_RI = _product(grad_RH, proj_out_EHI, ends_E, kernel)
    grad_weights_R1, weighted_RI, grad_pre_RJ = act.backward(grad_act_RI, weights_R1, pre_RJ)
    if needs[1]:
        grad_weights_TK = _with_zero_row(grad_weights_R1, weights_TK.dtype).squeeze(1)[slots.rows_TK]
    if needs[3]:
        grad_out_EHI = _outer_product(grad_RH, weighted_RI, ends_E, kernel)
    del grad_RH, grad_act_RI, weighted_RI
    if needs[2]:
        assert hidden_TH is not None
        grad_in_EJH = _outer_product(grad_pre_RJ, hidden_TH.index_select(0, slots.tokens_R), ends_E, kernel)
    if needs[4]:  # as a product with ones: deterministic, and summed in the kernel's precision
        ones_RX = grad_pre_RJ.new_ones((len(grad_pre_RJ), 16 // grad_pre_RJ.itemsize))  # rows of 16 bytes
        grad_bias_EJ = _outer_product(ones_RX, grad_pre_RJ, ends_E, kernel)[:, 0].contiguous()
    if needs[0]:
        dx_RH = _with_zero_row(
            _product(grad_pre_RJ, proj_in_EJH, ends_E, kernel), sum_dtype(grad_TH, weights_TK)
        )
        grad_hidden_TH = combine(dx_RH, slots.rows_TK).to(grad_TH.dtype)
    return grad_hidden_TH, grad_weights_TK, grad_in_EJH, grad_out_EHI, grad_bias_EJ


grouped = differentiable("grouped_mm", _forward, _backward, reads_sizes=False)
