"""The compute paths on an accelerator, where there is one, against the formula in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from path_cases import assert_same, formula, gradients, problem

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute import PATHS

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.mark.gpu
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("path", PATHS)
def test_on_an_accelerator_a_path_is_the_formula(path, dtype, activation):
    device = torch.accelerator.current_accelerator()
    args = problem(T=150, K=3, E=7, H=32, hidden=16, activation=activation)
    args[1][args[1] == 3] = -1  # an expert without tokens
    moved = [
        value.detach()
        .to(device, dtype if value.is_floating_point() else None)
        .requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for value in args
    ]
    grad = torch.linspace(-1, 1, args[0].numel(), dtype=torch.float64).view_as(args[0])
    ours = gradients(PATHS[path], moved, grad.to(device, dtype))
    assert_same(
        [value.double().cpu() for value in ours], gradients(formula, args, grad), args[1], TOLERANCES[dtype]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_on_an_accelerator_bfloat16_is_as_close_as_bfloat16_can_be(path):
    device = torch.accelerator.current_accelerator()
    args = problem(T=200, K=2, E=6, H=64, hidden=32, dtype=torch.bfloat16)
    args[1][args[1] == 3] = -1
    exact = [
        v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for v in args
    ]
    moved = [
        v.detach().to(device).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for v in args
    ]
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, theirs = gradients(PATHS[path], moved, grad.to(device)), gradients(formula, exact, grad.double())
    for name, a, b in zip(("out", "hidden", "gates", "proj_in", "proj_out"), ours, theirs, strict=True):
        b = b * (args[1] >= 0) if name == "gates" else b
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < 0.01, f"{name}: {error:.4f}"
