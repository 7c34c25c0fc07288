"""The compiled products of `gemv` against numpy's: every length, remainder and dtype the processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.codegen import get_host_cpu_features
from path_cases import formula, problem

from monge.moe.activation_kernels import _exp
from monge.moe.compute import PATHS, precision
from monge.moe.compute.dot_kernels import multiply_rows
from monge.moe.compute.vectors import MULTIPLIES_BFLOAT16

BITS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
CASES = [  # x, weights, output
    ("float32", "float32", np.float32),
    ("float32", "bfloat16", np.float32),
    ("float64", "float64", np.float64),
    ("float64", "bfloat16", np.float64),
    ("float32", "float64", np.float32),
    ("float32", "float32", np.float64),
    ("bfloat16", "bfloat16", np.float32),
]


def bits(x):
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@pytest.mark.parametrize(("x_dtype", "weight_dtype", "out_dtype"), CASES)
@pytest.mark.parametrize("length", [0, 1, 5, 8, 16, 37, 48, 130])
def test_products_of_rows(x_dtype, weight_dtype, out_dtype, length):
    if x_dtype == "bfloat16" and not MULTIPLIES_BFLOAT16:
        pytest.skip("the processor does not multiply bfloat16")
    rng = torch.Generator().manual_seed(length)
    for rows, columns in ((1, 1), (2, 3), (3, 4), (4, 6), (5, 64), (7, 2), (8, 5), (11, 13)):
        x = torch.randn(rows + 2, length, generator=rng, dtype=torch.float64).to(BITS[x_dtype])
        weights = torch.randn(columns, length, generator=rng, dtype=torch.float64).to(BITS[weight_dtype])
        chosen = torch.randperm(rows + 2, generator=rng)[:rows]
        out = np.full((rows, columns), np.nan, out_dtype)
        multiply_rows(bits(x), chosen.numpy(), bits(weights), out)
        exact = x[chosen].double() @ weights.double().T
        tolerance = 1e-13 if (x_dtype, out_dtype) == ("float64", np.float64) else 2e-6
        np.testing.assert_allclose(out, exact.numpy(), rtol=tolerance, atol=tolerance * (1 + length))


def test_nothing_is_written_beyond_the_block():
    """A view of a larger matrix: what lies around it stays."""
    x, weights = np.ones((5, 9), np.float32), np.ones((6, 9), np.float32)
    around = np.full((7, 10), -1, np.float32)
    multiply_rows(x, np.arange(5), weights, around[1:6, 2:8])
    assert (around[1:6, 2:8] == 9).all()
    around[1:6, 2:8] = -1
    assert (around == -1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [3, 40])
def test_what_is_not_finite_stays_in_its_row(value, place):
    x, weights = np.ones((6, 43), np.float32), np.ones((5, 43), np.float32)
    x[4, place] = value
    out = np.empty((6, 5), np.float32)
    multiply_rows(x, np.arange(6), weights, out)
    np.testing.assert_array_equal(out[4], np.full(5, value, np.float32))
    assert (np.delete(out, 4, axis=0) == 43).all()


@njit
def exponentials(x_n):
    out_n = np.empty_like(x_n)
    for n in range(len(x_n)):
        out_n[n] = _exp(x_n[n])
    return out_n


def test_the_exponential_of_float32():
    """To four units in the last place; beyond what float32 holds, large enough or small enough for SiLU."""
    x = np.linspace(-87, 88.3, 200_001, dtype=np.float32)
    assert np.abs(exponentials(x) / np.exp(x.astype(np.float64)) - 1).max() < 4 * np.finfo(np.float32).eps
    beyond = exponentials(np.array([-np.inf, -1000, 0, 1000, np.inf], np.float32))
    assert (beyond[:2] < 2e-38).all()
    assert beyond[2] == 1
    assert (beyond[3:] > 2e38).all()


@pytest.mark.parametrize("gate", [-1e38, -200.0, -90.0, 0.0, 90.0, 200.0, float("nan")])
def test_silu_far_from_zero(gate):
    """One neuron whose gate and up projection read off ``x``."""
    proj_in, proj_out = torch.tensor([[[1.0, 0], [0, 1]]]), torch.ones(1, 2, 1)
    x, one = torch.tensor([[gate, 3.0]]), torch.ones(1, 1)
    out = PATHS["gemv"](x, torch.zeros(1, 1, dtype=torch.int64), one, proj_in, proj_out, "swiglu")
    expected = (3 * torch.nn.functional.silu(x[:, :1])).expand(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="the processor does not multiply bfloat16")
def test_activations_are_rounded_to_the_nearest_bfloat16(monkeypatch):
    """Where bfloat16 is multiplied as it is: three roundings, each to nearest, NaN stays NaN."""
    x, indices, w, a, d, act = problem(T=40, K=2, E=5, H=48, hidden=24, empty=0, dtype=torch.bfloat16)
    exact = formula(*(v.double() if v.is_floating_point() else v for v in (x, indices, w, a, d)), act)
    error = (PATHS["gemv"](x, indices, w, a, d, act).double() - exact).norm() / exact.norm()
    monkeypatch.setattr(precision, "_has_units", lambda dtype: False)
    widened = (PATHS["gemv"](x, indices, w, a, d, act).double() - exact).norm() / exact.norm()
    assert widened < error < 0.003
    monkeypatch.undo()
    with torch.no_grad():
        x[7] = float("nan")
        broken = PATHS["gemv"](x, indices, w, a, d, act).isnan().all(dim=1)
    assert broken.nonzero().tolist() == [[7]]


@pytest.mark.slow
def test_a_processor_with_fewer_registers(tmp_path):
    """The same tests, and those of panels, compiled for AVX2: fewer rows at a time, bfloat16 widened."""
    features = get_host_cpu_features().split(",")
    if "+avx512f" not in features:
        pytest.skip("this is one")
    newer = ("avx512", "avx10", "amx")
    older = ",".join(f"-{name[1:]}" if name[1:].startswith(newer) else name for name in features)
    panels = Path(__file__).with_name("test_panel_kernels.py")
    names = (
        f"{__file__}::test_products_of_rows",
        f"{__file__}::test_nothing_is_written_beyond_the_block",
        f"{panels}::test_products",
        f"{panels}::test_nothing_is_written_beyond_the_columns",
        f"{panels}::test_experts_of_many_rows_and_few",
    )
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": older,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "17 skipped" in done.stdout, done.stdout[-300:]  # bfloat16 as it is
