"""SwiGLU in vectors against float64: every remainder of a row, all dtypes, and what lies around it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from monge.moe import vectors
from monge.moe.activation_kernels import SILU, activate, swiglu_backward
from monge.moe.compute import PATHS
from monge.moe.cpu_kernels import as_array
from monge.moe.vectors import LANES

WIDTHS = (1, 5, LANES - 1, LANES, LANES + 1, 2 * LANES + 5, 128)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@intrinsic
def exp(typing_context, x):
    def generate(context, builder, signature, args):
        series = vectors.exp(builder, vectors.splat(builder, args[0], LANES))
        return builder.extract_element(series, ir.Constant(vectors.I32, LANES - 1))

    return types.float32(x), generate


@njit(fastmath={"reassoc", "contract", "nsz"})  # as the loops that it is used in
def exponentials(x_n):
    out_n = np.empty_like(x_n)
    for n in range(len(x_n)):
        out_n[n] = exp(x_n[n])
    return out_n


def test_the_exponential_of_float32():
    """To four units in the last place; beyond what float32 holds, large enough or small enough for SiLU."""
    x = np.linspace(-87, 88.3, 200_001, dtype=np.float32)
    assert np.abs(exponentials(x) / np.exp(x.astype(np.float64)) - 1).max() < 4 * np.finfo(np.float32).eps
    beyond = exponentials(np.array([-np.inf, -1000, 0, 1000, np.inf], np.float32))
    assert (beyond[:2] < 2e-38).all()
    assert beyond[2] == 1
    assert (beyond[3:] > 2e38).all()


def numbers(*shape, dtype, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)


def close(ours, exact):
    """Within a rounding to the dtype of ours and five units of its sums."""
    sums = 6e-7 if ours.dtype != torch.float64 else 1e-15
    once = 0.51 * torch.finfo(ours.dtype).eps if ours.dtype == torch.bfloat16 else 0
    return ((ours.double() - exact).abs() <= (sums + once) * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_forward(dtype, keeps, biased):
    """For some neurons in the middle; those before and after are left as they are."""
    wide = torch.promote_types(dtype, torch.float32)
    for count, first in itertools.product(WIDTHS, (0, 3)):
        n, I = 4, first + count + 2
        gate, up = (numbers(n, count + 1, dtype=wide, seed=s, scale=9) for s in (1, 2))
        bias = numbers(2 * I if biased else 0, dtype=dtype, seed=3)
        act, pre = (
            torch.full((n, I), -1, dtype=dtype),
            torch.full((n if keeps else 0, 2 * I), -1, dtype=dtype),
        )
        exact = [gate[:, :count].double(), up[:, :count].double()]
        if biased:  # whose sum is rounded once
            ends = (first, I + first)
            exact = [
                (x + bias.double()[at : at + count]).to(wide).double()
                for x, at in zip(exact, ends, strict=True)
            ]
        tensors = gate.clone(), up.clone(), bias
        activate(*map(as_array, tensors), first, first + count, SILU, as_array(act), as_array(pre))
        here = slice(first, first + count)
        assert close(act[:, here], torch.nn.functional.silu(exact[0]) * exact[1])
        left = act.clone()
        left[:, here] = -1
        assert (left == -1).all()
        if keeps:
            there = slice(I + first, I + first + count)
            assert close(pre[:, here], exact[0])
            assert close(pre[:, there], exact[1])
            pre[:, here] = pre[:, there] = -1
            assert (pre == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype):
    """Every gradient against autograd's; what is added to that of the weights comes on top."""
    wide = torch.promote_types(dtype, torch.float32)
    for count, first in itertools.product(WIDTHS, (0, 3)):
        n, I = 4, first + count + 2
        here, there = slice(first, first + count), slice(I + first, I + first + count)
        pre, grad = numbers(n, 2 * I, dtype=dtype, scale=5), numbers(n, count + 1, dtype=wide, seed=1)
        weights, before = numbers(n, dtype=wide, seed=2), numbers(n, dtype=wide, seed=3)
        act, grad_pre = torch.full((n, I), -1, dtype=dtype), torch.full((n, 2 * I), -1, dtype=dtype)
        grad_weights = before.clone()
        tensors = weights, pre, grad
        swiglu_backward(
            *map(as_array, tensors), first, first + count, *map(as_array, (act, grad_pre, grad_weights))
        )
        gate, up, w = (x.double().requires_grad_() for x in (pre[:, here], pre[:, there], weights))
        output = w[:, None] * torch.nn.functional.silu(gate) * up
        exact = torch.autograd.grad((output * grad[:, :count].double()).sum(), (gate, up, w))
        bound = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-14}[dtype]
        terms = (grad[:, :count].double() * output / w[:, None]).abs().sum(dim=1)
        assert ((grad_weights.double() - before.double() - exact[2]).abs() <= bound * (1 + terms)).all()
        assert close(act[:, here], output)
        assert close(grad_pre[:, there], exact[1])
        # the slope of SiLU vanishes near -1.28, where its two terms cancel
        terms = (weights[:, None].double() * grad[:, :count].double() * up).abs()
        once = 0.51 * torch.finfo(dtype).eps * exact[0].abs() if dtype == torch.bfloat16 else 0
        assert ((grad_pre[:, here].double() - exact[0]).abs() <= bound * terms + once).all()
        act[:, here] = grad_pre[:, here] = grad_pre[:, there] = -1
        assert (act == -1).all()
        assert (grad_pre == -1).all()


def test_rounding_is_torchs():
    """Of what is kept: to the nearest bfloat16, ties to even; infinity and NaN stay."""
    special = [0.0, -0.0, 1.00390625, 1.01171875, 3.3961775e38, float("inf"), float("-inf"), float("nan")]
    gate = numbers(3, 2 * LANES + 5, dtype=torch.float32, scale=100)
    gate[1, : len(special)] = torch.tensor(special)
    act, pre = torch.empty(3, gate.shape[1]).bfloat16(), torch.empty(3, 2 * gate.shape[1]).bfloat16()
    activate(
        *map(as_array, (gate.clone(), gate.clone(), torch.empty(0))), 0, gate.shape[1], SILU, as_array(act),
        as_array(pre),
    )  # fmt: skip
    kept, expected = pre[:, : gate.shape[1]], gate.bfloat16()
    assert torch.equal(kept.isnan(), expected.isnan())
    assert torch.equal(kept.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [3, LANES + 2])
def test_nan_stays_in_its_neuron(dtype, place):
    """A gate that is NaN: of its row also the gradient of the weight, nothing of other neurons."""
    wide, I = torch.promote_types(dtype, torch.float32), LANES + 5
    pre = torch.ones(2, 2 * I, dtype=dtype)
    pre[1, place] = float("nan")
    act, grad_pre, grad_weights = (
        torch.zeros(2, I, dtype=dtype),
        torch.zeros_like(pre),
        torch.zeros(2, dtype=wide),
    )
    tensors = torch.ones(2, dtype=wide), pre, torch.ones(2, I, dtype=wide)
    swiglu_backward(*map(as_array, tensors), 0, I, *map(as_array, (act, grad_pre, grad_weights)))
    assert act.isnan().nonzero().tolist() == [[1, place]]
    assert grad_pre.isnan().nonzero().tolist() == [[1, place], [1, I + place]]
    assert grad_weights.isnan().tolist() == [False, True]


@pytest.mark.parametrize("gate", [-1e38, -200.0, -90.0, 0.0, 90.0, 200.0, float("nan")])
def test_silu_far_from_zero(gate):
    """One neuron whose gate and up projection read off ``x``."""
    proj_in, proj_out = torch.tensor([[[1.0, 0], [0, 1]]]), torch.ones(1, 2, 1)
    x, one = torch.tensor([[gate, 3.0]]), torch.ones(1, 1)
    out = PATHS["gemv"](x, torch.zeros(1, 1, dtype=torch.int64), one, proj_in, proj_out, "swiglu")
    expected = (3 * torch.nn.functional.silu(x[:, :1])).expand(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-30, equal_nan=True)
