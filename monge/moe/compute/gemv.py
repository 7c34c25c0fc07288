"""`gemv`: the chosen experts in one compiled function, on the CPU.

Where an expert has one row or a few, its products are bound by reading its weights (they are matrix-vector
products, hence the name). The function (gemv_kernels.py) reads those of the chosen experts once, in
transformers' layout, on all threads. Around it there is as little Python as can be: between two layers of a
large model other weights fill the caches, and what takes microseconds in a loop takes tenths of a millisecond
there. Where experts have many rows the processor is the bound, and with AVX-512 it is nearly reached
(docs/performance.md).

Sums are float32 (float64 for float64). Bfloat16 is widened on the way, or multiplied as it is by processors
with an instruction for that; there the activations are rounded to it, as by every other path. The backward is
that of `sorted`; so is the forward on an accelerator, in float16, and for weights that are not contiguous.

Shapes: T tokens, K slots, E experts, H width, I expert width, J = 2 I (gated) or I, N filled slots, R rows:
operator.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monge.moe.activation_kernels import FUNCTIONS
from monge.moe.compute import gemv_kernels as kernels
from monge.moe.compute import sorted as by_expert
from monge.moe.compute.memory import empty
from monge.moe.compute.operator import differentiable, sum_dtype
from monge.moe.compute.precision import product_dtype
from monge.moe.cpu_kernels import as_array, sort_by_expert
from monge.moe.vectors import MULTIPLIES_BFLOAT16
from monge.ot.threads import on_threads, openmp_region

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ALONE = 2**16  # multiply-adds that one thread does faster than it wakes another


def _takes(*weights: Tensor) -> bool:
    """Whether the compiled loops run on these weights."""
    return all(w.device.type == "cpu" and w.dtype in _DTYPES and w.is_contiguous() for w in weights)


def _narrow(*tensors: Tensor) -> bool:
    """Whether bfloat16 is multiplied as it is."""
    dtypes, cpu = {x.dtype for x in tensors}, tensors[0].device
    return MULTIPLIES_BFLOAT16 and dtypes == {torch.bfloat16} == {product_dtype(torch.bfloat16, cpu)}


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
    out_dtype = sum_dtype(hidden_TH, weights_TK)
    E, J, H = proj_in_EJH.shape
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    dtype = torch.bfloat16 if _narrow(hidden_TH, proj_in_EJH, proj_out_EHI) else wide
    x = as_array(hidden_TH.to(dtype).contiguous())
    gates = as_array(weights_TK.to(out_dtype)).reshape(-1)
    proj_in, proj_out = as_array(proj_in_EJH), as_array(proj_out_EHI)
    bias = np.empty((E, 0), proj_in.dtype) if bias_EJ is None else as_array(bias_EJ)
    starts, tokens, order, _ = sort_by_expert(indices_TK.numpy(), E, padded)
    pre_RJ = empty(hidden_TH, (len(tokens) if keep else 0, J))
    pre = as_array(pre_RJ)
    act = np.empty((len(tokens), proj_out.shape[2]), x.dtype)
    out_TH = hidden_TH.new_empty(hidden_TH.shape)
    out = as_array(out_TH)
    counters, function = np.zeros(kernels.DONE_IN + E, np.int64), FUNCTIONS[activation]
    threads = 1 if int(starts[-1]) * J * H < ALONE else torch.get_num_threads()

    arguments = (
        x, starts, tokens, order, gates, proj_in, bias, proj_out, function, pre, act, out, counters, threads,
    )  # fmt: skip
    region = openmp_region() if threads > 1 else 0
    if not region:
        on_threads(lambda: kernels.run_experts(*arguments), threads)
    elif not kernels.run_on_threads(region, threads, arguments):
        raise MemoryError("no memory for the sums of an expert: fewer tokens at a time need less")
    return out_TH, pre_RJ


gemv = differentiable("gemv", _forward, by_expert.backward)
