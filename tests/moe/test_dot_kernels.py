"""The compiled products of `gemv` against numpy's: every length, remainder and dtype the processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core.codegen import get_host_cpu_features
from path_cases import formula, problem

from monge.moe.compute import PATHS, precision
from monge.moe.compute.dot_kernels import multiply_rows
from monge.moe.vectors import MULTIPLIES_BFLOAT16

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
        str(Path(__file__).with_name("test_swiglu_kernels.py")),
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
