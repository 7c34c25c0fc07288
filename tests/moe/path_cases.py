"""Problems for the compute paths, and the formula that they compute, differentiated by autograd."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from monge.moe.activations import ACTIVATIONS

UNGATED = {"gelu", "gelu_tanh", "relu"}
FUNCTIONS = {
    "swiglu": F.silu,
    "geglu": partial(F.gelu, approximate="tanh"),
    "geglu_exact": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def formula(x_TH, indices_TK, weights_TK, proj_in, proj_out, activation) -> Tensor:
    """sum_k w_tk expert(x_t), every expert on every token; differentiated by autograd."""
    gate = FUNCTIONS[activation]
    out_TH = torch.zeros_like(x_TH)
    for e in range(len(proj_in)):
        pre = x_TH @ proj_in[e].T
        half = pre.shape[1] // 2
        act = gate(pre) if activation in UNGATED else gate(pre[:, :half]) * pre[:, half:]
        gate_T = torch.where(indices_TK == e, weights_TK, 0).sum(dim=1)
        out_TH = out_TH + gate_T[:, None] * (act @ proj_out[e].T)
    return out_TH


def problem(T, K, E, H=6, hidden=5, activation="swiglu", empty=0.2, seed=0, dtype=torch.float64):
    """Hidden states, distinct random experts, gates with some empty slots, and weights; all require grad."""
    rng = torch.Generator().manual_seed(seed)
    indices_TK = torch.rand(T, E, generator=rng).argsort(dim=1)[:, :K]
    drop = torch.rand(T, K, generator=rng) < empty
    indices_TK = indices_TK.masked_fill(drop, -1)
    weights_TK = torch.rand(T, K, generator=rng, dtype=torch.float64).masked_fill(drop, 0)
    weights_TK = weights_TK.to(torch.promote_types(dtype, torch.float32))
    J = ACTIVATIONS[activation].width(hidden)
    x = torch.randn(T, H, generator=rng, dtype=torch.float64).to(dtype)
    proj_in = torch.randn(E, J, H, generator=rng, dtype=torch.float64).to(dtype)
    proj_out = torch.randn(E, H, hidden, generator=rng, dtype=torch.float64).to(dtype)
    floats = [v.requires_grad_() for v in (x, weights_TK, proj_in, proj_out)]
    return floats[0], indices_TK, *floats[1:], activation


def gradients(function, args, grad=None):
    """The output and the gradients for hidden, weights, proj_in and proj_out."""
    leaves = [args[0], args[2], args[3], args[4]]
    out = function(*args)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) if grad is None else grad
    return [out, *torch.autograd.grad(out, leaves, grad)]


def assert_same(ours, theirs, indices_TK, tol=1e-10):
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if i == 2:  # an empty slot has no gate: its gradient is zero by definition
            assert (a[indices_TK < 0] == 0).all()
            b = b * (indices_TK >= 0)
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
