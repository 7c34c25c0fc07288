"""`gemv`: compiled matrix-vector products over the chosen experts, for a few rows per expert on the CPU.

Where an expert has one row or a few, its products are bound by reading its weights. Two compiled loops
(monge/moe/cpu_kernels.py) read those of the chosen experts once, in transformers' layout, each thread a range
of the rows of every expert; the activation in between is torch's. Sums are float32 (float64 for float64),
bfloat16 weights are widened on the way. The backward is that of `sorted`; so is the forward on an
accelerator, in float16, and for weights that are not contiguous.

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, N filled slots, R rows:
operator.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monge.moe import cpu_kernels
from monge.moe.activations import ACTIVATIONS
from monge.moe.compute import sorted as by_expert
from monge.moe.compute.operator import differentiable, sum_dtype
from monge.moe.dispatch import sort_slots
from monge.ot.threads import run_all, split

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALONE = 2**16  # multiply-adds that one thread does faster than it wakes another


def _takes(*weights: Tensor) -> bool:
    """Whether the compiled loops run on these weights."""
    return all(w.device.type == "cpu" and w.dtype in _DTYPES and w.is_contiguous() for w in weights)


def _array(x: Tensor) -> np.ndarray:
    """The same memory for numpy, which has no bfloat16: its bits.

    Not by ``Tensor.numpy``, which forbids to resize the storage ever after: FSDP frees gathered weights so.
    """
    x = x.detach()
    return np.from_dlpack(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x)


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
    if not _takes(proj_in_EJH, proj_out_EHI):
        return by_expert.forward(
            hidden_TH, indices_TK, weights_TK, proj_in_EJH, proj_out_EHI, activation, keep, padded, bias_EJ
        )
    dtype, out_dtype = torch.promote_types(hidden_TH.dtype, torch.float32), sum_dtype(hidden_TH, weights_TK)
    slots = sort_slots(indices_TK, proj_in_EJH.shape[0], padded=padded)
    starts, tokens = slots.starts_E1.numpy(), slots.tokens_R.numpy()
    N, J, H = int(starts[-1]), proj_in_EJH.shape[1], proj_in_EJH.shape[2]
    threads, alone = torch.get_num_threads(), N * J * H < ALONE

    x, proj_in, proj_out = _array(hidden_TH.to(dtype).contiguous()), _array(proj_in_EJH), _array(proj_out_EHI)
    pre_RJ = hidden_TH.new_empty((len(tokens), J), dtype=dtype)
    pre = pre_RJ.numpy()
    run_all(
        lambda rows: cpu_kernels.project_in(x, tokens, starts, proj_in, *rows, pre),
        split(J, threads),
        alone=alone,
    )
    pre_NJ = pre_RJ[:N]
    if bias_EJ is not None:
        pre_NJ += bias_EJ.index_select(0, indices_TK.flatten()[slots.order_R[:N]])

    act = ACTIVATIONS[activation].forward(pre_NJ).numpy()
    gates = _array(weights_TK.to(out_dtype)).reshape(-1)[slots.order_R.numpy()]
    out_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=out_dtype)
    out = out_TH.numpy()
    run_all(
        lambda rows: cpu_kernels.project_out(act, tokens, gates, starts, proj_out, *rows, out),
        split(H, threads),
        alone=alone,
    )
    return out_TH.to(hidden_TH.dtype), pre_RJ.to(hidden_TH.dtype) if keep else hidden_TH.new_empty((0, J))


gemv = differentiable("gemv", _forward, by_expert.backward)
