"""Gradients by panels: products along columns against float64, whole experts against autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from path_cases import FUNCTIONS, UNGATED, formula, gradients, problem

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute import PATHS, column_products, precision, rows
from monge.moe.compute.outer_kernels import LEFT, multiply_outer
from monge.moe.compute.packing_kernels import WIDTH
from monge.moe.compute.row_products import multiply_columns
from monge.moe.cpu_kernels import as_array, compiled, prefetch
from monge.moe.vectors import MANY_REGISTERS, MULTIPLIES_BFLOAT16

narrow = pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="the processor does not multiply bfloat16")
panels = pytest.mark.skipif(not MANY_REGISTERS, reason="without AVX-512 these products are torch's")
DTYPES = [
    pytest.param(torch.float32, marks=panels),
    pytest.param(torch.bfloat16, marks=narrow),
]
KERNEL_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=narrow)]


def numbers(*shape, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def close(ours, exact, terms, dtype):
    """Within the rounding of the sums and, once, of the result."""
    once = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    return ((ours.double() - exact).abs() <= 3e-6 * (1 + terms) + 0.51 * once * exact.abs()).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("length", [1, 2, 31, 64])
def test_columns_of_float32_and_of_widened_weights(dtypes, length):
    for count, columns in itertools.product((1, 2, 5, 6, 8, 13), (1, 63, 64, 65, 130)):
        x, weights = (
            numbers(count, length, dtype=dtypes[0]),
            numbers(length, columns, dtype=dtypes[1], seed=1),
        )
        out = np.full((count, columns), 7, np.float32)
        multiply_columns(as_array(x), as_array(weights), 0, columns, out, as_array(weights)[:, :WIDTH])
        assert close(torch.from_numpy(out), x.double() @ weights.double(), length, torch.float32)


@narrow
@pytest.mark.parametrize("length", [2, 4, 30, 130])
def test_columns_of_bfloat16(length):
    for count, columns in itertools.product((1, 2, 5, 6, 8, 13), (1, 63, 64, 65, 130)):
        x = numbers(count, length, dtype=torch.bfloat16)
        weights = numbers(length, columns, dtype=torch.bfloat16, seed=1)
        out = np.full((count, columns), 7, np.float32)
        multiply_columns(as_array(x), as_array(weights), 0, columns, out, as_array(weights)[:, :WIDTH])
        assert close(torch.from_numpy(out), x.double() @ weights.double(), length, torch.float32)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_some_of_the_columns(dtype):
    """Those asked for come first; nothing is written beyond the columns that the output has."""
    x, weights = numbers(9, 16, dtype=dtype), numbers(16, 300, dtype=dtype, seed=1)
    around = np.full((9, 150), -1, np.float32)
    multiply_columns(
        as_array(x), as_array(weights), 128, 250, around[:, 10:132], as_array(weights)[:, :WIDTH]
    )
    exact = x.double() @ weights.double()[:, 128:250]
    assert close(torch.from_numpy(around[:, 10:132].copy()), exact, 16, torch.float32)
    assert (around[:, :10] == -1).all()
    assert (around[:, 132:] == -1).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_outer_products(dtype, count):
    """Every remainder on both sides, and an odd number of rows, whose last bfloat16 has no partner."""
    for X, Y in itertools.product((1, 2, 5, 6, 9, LEFT - 1, LEFT, LEFT + 3), (1, 15, 16, 63, 64, 65, 130)):
        a, b = numbers(count, X, dtype=dtype), numbers(count, Y, dtype=dtype, seed=1)
        around = torch.full((X + 2, Y), 7, dtype=dtype)
        multiply_outer(as_array(a), as_array(b), 0, X, as_array(around)[1 : X + 1])
        assert close(around[1 : X + 1], a.double().T @ b.double(), count, dtype)
        assert (around[[0, -1]] == 7).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_outer_products_write_no_further_columns(dtype):
    a, b = torch.ones(6, 70, dtype=dtype), torch.ones(6, 70, dtype=dtype)
    around = torch.full((70, 80), -1, dtype=dtype)
    multiply_outer(as_array(a), as_array(b), 0, 70, as_array(around)[:, 5:75])
    assert (around[:, 5:75] == 6).all()
    around[:, 5:75] = -1
    assert (around == -1).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_what_is_not_finite_stays_in_its_column(dtype):
    a, b = torch.ones(8, 10, dtype=dtype), torch.ones(8, 20, dtype=dtype)
    a[3, 4], b[2, 7] = float("nan"), float("inf")
    out = torch.empty(10, 20, dtype=dtype)
    multiply_outer(as_array(a), as_array(b), 0, 10, as_array(out))
    assert out[4].isnan().all()
    assert not out[[*range(4), *range(5, 10)]].isnan().any()
    assert (out[:4, 7] == float("inf")).all()
    assert (out[:4, 8] == 8).all()


def exact_backward(activation, grad, hidden, weights, proj_in, proj_out):
    """The gradients of ``sum_n weights_n <grad_n, expert(hidden_n)>`` in float64, by autograd."""
    given = (weights, proj_in, proj_out, torch.zeros(len(proj_in)), hidden)
    leaves = [v.detach().double().requires_grad_() for v in given]
    weights, proj_in, proj_out, bias, hidden = leaves
    pre, half = hidden @ proj_in.T + bias, len(bias) // 2
    gate = FUNCTIONS[activation]
    act = gate(pre) if activation in UNGATED else gate(pre[:, :half]) * pre[:, half:]
    total = ((act @ proj_out.T) * grad.double() * weights[:, None]).sum()
    return pre.detach(), torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
@pytest.mark.parametrize("size", [(64, 34, 130), (77, 64, 128), (200, 96, 40)])  # n, H, I
def test_an_expert_that_a_thread_has_to_itself(dtype, activation, size, monkeypatch):
    n, H, I = size
    act = ACTIVATIONS[activation]
    grad, hidden = numbers(n, H, dtype=dtype), numbers(n, H, dtype=dtype, seed=1)
    proj_in = (numbers(act.width(I), H, dtype=torch.float64, seed=2) / H**0.5).to(dtype)
    proj_out = (numbers(H, I, dtype=torch.float64, seed=3) / I**0.5).to(dtype)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(4))
    pre, exact = exact_backward(activation, grad, hidden, weights, proj_in, proj_out)
    grad_in, grad_out = torch.full_like(proj_in, 7), torch.full_like(proj_out, 7)
    grad_bias, grad_hidden = torch.full((len(proj_in),), 7, dtype=dtype), torch.full((n, H), 7.0)
    monkeypatch.setattr(rows, "mm", None)  # no product is torch's, but for that of other activations
    if activation != "swiglu":
        monkeypatch.setattr(rows, "mm", torch.mm)
        monkeypatch.setattr(rows, "mm_into", None)
    gates = rows.expert_backward(
        act, grad, hidden, weights, pre.to(dtype), proj_in, proj_out,
        grad_in, grad_out, grad_bias, grad_hidden, alone=True,
    )  # fmt: skip
    bound = 3e-6 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip((gates, grad_in, grad_out, grad_bias, grad_hidden), exact, strict=True):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["gemv", "sorted"])
def test_gradients_of_a_path_with_many_rows(path, dtype, monkeypatch):
    """Experts of more rows than panels need and of fewer, in one call, with empty slots; on two threads."""
    counts = (200, 180, 30, 90)
    x, indices, w, a, d, act = problem(T=500, K=1, E=4, H=96, hidden=80, empty=0, dtype=dtype)
    indices = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)])[:, None]
    indices = indices[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    indices[::50] = -1
    exact = [v.detach().double().requires_grad_() for v in (x, w, a, d)]
    theirs = gradients(formula, (exact[0], indices, *exact[1:], act))
    used = spy(monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ours = gradients(PATHS[path], (x, indices, w, a, d, act))
    assert used == [3]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        other = other * (indices >= 0) if i == 2 else other
        assert (one.double() - other).norm() <= bound * other.norm()


def spy(monkeypatch):
    """A list of one number: how many experts had their gradients by panels."""
    used, through = [0], column_products.through_swiglu

    def count(*arguments):
        used[0] += 1
        return through(*arguments)

    monkeypatch.setattr(column_products, "through_swiglu", count)
    return used


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices", ["one expert", "spread"])
def test_threads_change_no_bit_of_a_gradient(dtype, indices, monkeypatch):
    """Whether a thread has an expert to itself or all threads share it, or there is one thread."""
    x, chosen, w, a, d, act = problem(T=300, K=1, E=2, H=130, hidden=300, empty=0, dtype=dtype)
    chosen = torch.zeros_like(chosen) if indices == "one expert" else chosen
    used, results = spy(monkeypatch), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(gradients(PATHS["gemv"], (x, chosen, w, a, d, act)))
    assert used == [3 if indices == "one expert" else 6]
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@panels
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, indices, w, a, d, act = problem(T=150, K=2, E=2, H=16, hidden=8, empty=0, dtype=torch.float32)
    leaves = [x, w, a, d]
    every = gradients(PATHS["gemv"], (x, indices, w, a, d, act))[1:]
    leaves[frozen].requires_grad_(False)
    out = PATHS["gemv"](x, indices, w, a, d, act)
    grad = torch.linspace(-1, 1, out.numel()).view_as(out)
    left = [i for i in range(4) if i != frozen]
    for i, ours in zip(left, torch.autograd.grad(out, [leaves[i] for i in left], grad), strict=True):
        assert torch.equal(ours, every[i])


def test_what_panels_do_not_take(monkeypatch):
    """Rows, dtypes and layouts for which torch computes, and processors with units for tiles."""

    def fit(dtype, n=64, H=8, J=8, wide=torch.float32):
        weights = [torch.zeros(H, J // 2, dtype=dtype), torch.zeros(J, H, dtype=dtype)]
        gates = torch.zeros(n, dtype=wide)
        return column_products.fit(torch.zeros(n, H, dtype=dtype), gates, weights, [None, weights[1]], None)

    assert fit(torch.float32) == MANY_REGISTERS
    assert fit(torch.bfloat16) == (MULTIPLIES_BFLOAT16 and not precision.has_tiles())
    monkeypatch.setattr(column_products, "MANY_REGISTERS", True)
    monkeypatch.setattr(column_products, "MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(precision, "has_tiles", lambda: False)
    assert fit(torch.float32)
    assert fit(torch.bfloat16)
    assert fit(torch.float32, H=7)
    assert not fit(torch.float64)
    assert not fit(torch.float16)
    assert not fit(torch.float32, n=63)
    assert not fit(torch.bfloat16, H=7)
    assert not fit(torch.float32, wide=torch.float64)
    square = torch.zeros(64, 64)
    assert column_products.fit(square, square[0], [square], [], None)
    assert not column_products.fit(square, square[0], [square.t()[:, :32]], [], None)
    assert not column_products.fit(square, square[0], [square], [square.bfloat16()], None)
    assert not column_products.fit(square, square[0], [square], [], square.bfloat16())
    monkeypatch.setattr(precision, "has_tiles", lambda: True)
    assert fit(torch.float32)
    assert not fit(torch.bfloat16)


def test_rows_that_are_not_there_are_not_asked_for():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for n in (0, 2, 3, 10**12):
        call_prefetch(values, n)
    assert (values == np.arange(12).reshape(3, 4)).all()


@compiled
def call_prefetch(values_NX, n):
    prefetch(values_NX, n, 0, values_NX.shape[1])
