"""Products with panels of columns against numpy's: every remainder, both words, with gates and without."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numba import njit

from monge.moe.compute import PATHS, row_products
from monge.moe.compute.packing_kernels import WIDTH, empty_panel, pack_rows, words
from monge.moe.compute.panel_kernels import multiply_panel
from monge.moe.cpu_kernels import as_array
from monge.moe.vectors import MULTIPLIES_BFLOAT16

narrow = pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="the processor does not multiply bfloat16")
DTYPES = [  # of x and weights
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    pytest.param((torch.bfloat16, torch.bfloat16), marks=narrow),
]


@njit
def product(x_TX, rows_n, weights_mX, gates_n, out_Tm, places_n):
    panel_KW = empty_panel(words(x_TX, x_TX))
    for first in range(0, len(weights_mX), WIDTH):
        pack_rows(words(weights_mX, x_TX), first, panel_KW)
        multiply_panel(words(x_TX, x_TX), rows_n, panel_KW, gates_n, out_Tm, places_n, first, weights_mX)


def numbers(rows, columns, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("length", [0, 2, 16, 30, 32, 34, 48, 130])
def test_products(dtypes, length):
    """Rows chosen from x and written to chosen places, the others left as they were."""
    for rows, columns in itertools.product((1, 2, 5, 6, 7, 9, 14), (1, 15, 16, 63, 64, 65, 130)):
        x, weights = numbers(rows + 3, length, dtypes[0]), numbers(columns, length, dtypes[1], seed=1)
        order = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(rows))
        chosen, places = order[:rows], order.flip(0)[:rows]
        exact = x[chosen].double() @ weights.double().T
        for gates in (None, torch.linspace(-2, 2, rows)):
            out = np.full((rows + 3, columns), 7, np.float32)
            taken = None if gates is None else gates.numpy()
            product(as_array(x), chosen.numpy(), as_array(weights), taken, out, places.numpy())
            expected = torch.full((rows + 3, columns), 7.0, dtype=torch.float64)
            expected[places] = exact if gates is None else 7 + gates.double()[:, None] * exact
            np.testing.assert_allclose(out, expected.numpy(), rtol=3e-6, atol=3e-6 * (1 + length))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_nothing_is_written_beyond_the_columns(dtypes):
    x, weights = torch.ones(8, 34).to(dtypes[0]), torch.ones(70, 34).to(dtypes[1])
    around = np.full((10, 80), -1, np.float32)
    product(as_array(x), np.arange(8), as_array(weights), None, around[1:9, 5:75], np.arange(8))
    assert (around[1:9, 5:75] == 34).all()
    around[1:9, 5:75] = -1
    assert (around == -1).all()


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_not_finite_stays_in_its_row(dtypes, gated):
    x = torch.ones(9, 32)
    x[4, 3] = float("nan")
    gates = np.ones(9, np.float32) if gated else None
    out = np.zeros((9, 5), np.float32)
    weights, every = torch.ones(5, 32).to(dtypes[1]), np.arange(9)
    product(as_array(x.to(dtypes[0])), every, as_array(weights), gates, out, every)
    assert np.isnan(out[4]).all()
    assert (np.delete(out, 4, axis=0) == 32).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_experts_of_many_rows_and_few(dtype, activation):
    """In one call some experts have rows for panels, others not: both near the path `loop` in float64."""
    T, H, I = 400, 96, 80
    few = row_products.PANEL_ROWS
    counts = (few + 5, 3, few - 1, 0)
    indices = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)] + [0] * T)[:T, None]
    x, gates = numbers(T, H, dtype), torch.rand(T, 1, generator=torch.Generator().manual_seed(1))
    proj_in = numbers(4 * (2 * I if activation == "swiglu" else I), H, dtype, seed=2).view(4, -1, H) / H**0.5
    proj_out = numbers(4 * H, I, dtype, seed=3).view(4, H, I) / I**0.5
    bias = numbers(4, proj_in.shape[1], dtype, seed=4)
    arguments = indices, gates, proj_in, proj_out

    def run(path, *tensors):
        x, indices, *rest = tensors
        return PATHS[path](x, indices, *rest[:3], activation, bias_EJ=rest[3])

    exact = run("loop", x.double(), indices, *(tensor.double() for tensor in (*arguments[1:], bias)))
    bound = 2e-6 if dtype == torch.float32 else 5e-3
    assert (run("gemv", x, *arguments, bias).double() - exact).norm() < bound * exact.norm()
