"""Plans of monge.ot.sinkhorn: right against POT, exact in their marginals, blind to what must not matter.

Shapes: T rows, E columns.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import ot as pot
import pytest
import torch
from hypothesis import example, given, settings

from monge.ot import sinkhorn

INF = float("inf")


def pot_plan(scores, epsilon, row_mass, col_mass):
    """POT's log-domain solution for the same problem."""
    row, col = row_mass.double().numpy(), col_mass.double().numpy()
    col = col * row.sum() / col.sum()
    plan = pot.sinkhorn(
        row, col, -scores.double().numpy(), epsilon, method="sinkhorn_log", stopThr=1e-12, numItermax=50_000
    )
    return torch.from_numpy(plan)


def assert_optimal(result, scores, epsilon, row_mass, col_mass, tol):
    """Marginals and the form of the solution together prove optimality."""
    unit = float(row_mass.sum() / (row_mass > 0).sum().clamp_min(1))
    target = col_mass * row_mass.sum(-1) / col_mass.sum()
    plan = result.plan.double()
    assert (plan.sum(-1) - row_mass).abs().max() <= max(tol, 3e-7) * unit
    assert (plan.sum(-2) - target).abs().max() <= (tol + 3e-7 * target.max() / unit) * unit
    rebuilt = torch.exp(result.log_u[..., None] + scores.double() / epsilon + result.log_v[..., None, :])
    rebuilt = torch.where((row_mass > 0)[..., None], rebuilt, 0.0)
    torch.testing.assert_close(plan, rebuilt, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("T", "E", "epsilon"), [(40, 7, 1.0), (150, 16, 0.3), (33, 33, 0.5), (5, 20, 0.7), (25, 5, 0.05)]
)
def test_agrees_with_pot(T, E, epsilon, dtype):
    scores = torch.randn(T, E, dtype=dtype)
    row_mass, col_mass = torch.rand(T) + 0.1, torch.rand(E) + 0.1
    tol = 1e-9 if dtype == torch.float64 else 1e-7
    result = sinkhorn(scores, epsilon=epsilon, row_mass=row_mass, col_mass=col_mass, tol=tol, max_iters=5000)
    assert result.converged
    torch.testing.assert_close(
        result.plan.double(), pot_plan(scores, epsilon, row_mass, col_mass), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_agrees_with_pot_in_kernel_form(spread):
    scores = (torch.rand(300, 12, dtype=torch.float64) - 0.5) * spread
    row_mass, col_mass = torch.ones(300), torch.rand(12) + 0.5
    row, col = row_mass.numpy(), (col_mass * 300 / col_mass.sum()).numpy()
    expected = pot.bregman.sinkhorn_knopp(
        row, col, -scores.numpy(), 1.0, stopThr=1e-9, numItermax=10_000, warn=False
    )
    result = sinkhorn(scores, col_mass=col_mass, tol=1e-9, max_iters=1000)
    torch.testing.assert_close(result.plan, torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_maximises_score_plus_entropy():
    scores = torch.randn(12, 4, dtype=torch.float64)
    plan = sinkhorn(scores, epsilon=0.5, tol=1e-12, max_iters=1000).plan

    def value(p):
        return float((p * scores).sum() - 0.5 * torch.xlogy(p, p).sum() + 0.5 * p.sum())

    for _ in range(50):  # feasible neighbours: add a matrix whose rows and columns sum to 0
        step = torch.randn(12, 4, dtype=torch.float64)
        step = step - step.mean(0) - step.mean(1, keepdim=True) + step.mean()
        other = plan + step * (0.5 * plan.min() / step.abs().max())
        assert value(other) < value(plan)


@given(
    T=st.integers(1, 90),
    E=st.integers(1, 20),
    spread=st.sampled_from([0.0, 1.0, 10.0, 60.0]),
    epsilon=st.sampled_from([0.05, 0.5, 3.0]),
    wide=st.booleans(),
    even=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(T=64, E=16, spread=10.0, epsilon=0.5, wide=False, even=True, seed=0)
@example(T=65, E=17, spread=60.0, epsilon=0.05, wide=True, even=False, seed=1)
@settings(max_examples=150)
def test_marginals_and_optimality(T, E, spread, epsilon, wide, even, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    scores = (torch.rand(T, E, generator=generator, dtype=dtype) * 2 - 1) * spread
    row_mass = torch.ones(T, dtype=torch.float64)
    col_mass = torch.ones(E, dtype=torch.float64)
    if not even:
        row_mass = torch.rand(T, generator=generator, dtype=torch.float64).round(decimals=1)  # some are 0
        row_mass[0] = 1.0
        col_mass = torch.rand(E, generator=generator, dtype=torch.float64) + 0.1
    result = sinkhorn(scores, epsilon=epsilon, row_mass=row_mass, col_mass=col_mass, max_iters=400)
    assert result.plan.dtype == dtype
    assert result.converged
    assert int(result.iterations) <= 400
    assert_optimal(result, scores, epsilon, row_mass, col_mass, 1e-4)


@given(seed=st.integers(0, 2**16), epsilon=st.sampled_from([0.02, 0.3, 1.0]))
@settings(max_examples=40)
def test_shifts_of_rows_and_columns_change_nothing(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    row_shift = 20 * torch.randn(30, 1, generator=generator, dtype=torch.float64)
    col_shift = 20 * torch.randn(1, 6, generator=generator, dtype=torch.float64)
    moved = (col_shift[0] - col_shift.mean()) / epsilon
    # A column's shift goes unnoticed even by a capped computation, a row's by a converged one.
    for shift, max_iters in ((col_shift, 3), (row_shift + col_shift, 2000)):
        plain = sinkhorn(scores, epsilon=epsilon, tol=1e-10, max_iters=max_iters)
        shifted = sinkhorn(scores + shift, epsilon=epsilon, tol=1e-10, max_iters=max_iters)
        torch.testing.assert_close(shifted.plan, plain.plan, atol=1e-8, rtol=0)
        torch.testing.assert_close(shifted.log_v, plain.log_v - moved, atol=1e-6, rtol=0)


def test_scaling_all_masses_scales_the_plan():
    scores = torch.randn(20, 5, dtype=torch.float64)
    one = sinkhorn(scores)
    many = sinkhorn(scores, row_mass=torch.full((20,), 1e6), col_mass=torch.full((5,), 3.0))
    assert one.iterations == many.iterations
    torch.testing.assert_close(many.plan, 1e6 * one.plan)


def test_columns_are_even_by_default_and_potentials_centred():
    result = sinkhorn(torch.randn(40, 8), tol=1e-6)
    torch.testing.assert_close(result.plan.sum(0), torch.full((8,), 5.0))
    assert abs(float(result.log_v.mean())) < 1e-12
    assert result.log_u.shape == (40,)
    assert result.row_error <= 1e-6
    assert result.col_error <= 1e-6


def test_batch_equals_one_by_one():
    scores = torch.randn(2, 3, 50, 6) * torch.tensor([0.1, 3.0, 30.0]).view(1, 3, 1, 1)
    col_mass = torch.rand(6) + 0.2
    mask = torch.rand(2, 3, 50) > 0.2
    batched = sinkhorn(scores, epsilon=0.5, col_mass=col_mass, mask=mask, tol=1e-8, max_iters=500)
    assert batched.plan.shape == scores.shape
    assert batched.iterations.shape == batched.converged.shape == (2, 3)
    assert batched.converged.all()
    for i, j in np.ndindex(2, 3):
        one = sinkhorn(scores[i, j], epsilon=0.5, col_mass=col_mass, mask=mask[i, j], tol=1e-8, max_iters=500)
        torch.testing.assert_close(batched.plan[i, j], one.plan, atol=1e-6, rtol=0)
        torch.testing.assert_close(batched.log_v[i, j], one.log_v, atol=1e-5, rtol=0)


def test_masked_rows_do_not_exist():
    scores = torch.randn(30, 5)
    mask = torch.rand(30) > 0.4
    scores[~mask] = float("nan")
    result = sinkhorn(scores, mask=mask)
    alone = sinkhorn(scores[mask])
    torch.testing.assert_close(result.plan[mask], alone.plan)
    torch.testing.assert_close(result.log_v, alone.log_v)
    assert result.plan[~mask].eq(0).all()
    assert result.log_u[~mask].eq(-INF).all()
    everything_masked = sinkhorn(scores, mask=torch.zeros(30, dtype=torch.bool))
    assert everything_masked.converged
    assert everything_masked.plan.eq(0).all()


def test_columns_without_mass_stay_empty():
    scores = torch.randn(20, 4)
    result = sinkhorn(scores, col_mass=torch.tensor([1.0, 0.0, 2.0, 1.0]), tol=1e-6)
    assert result.plan[:, 1].eq(0).all()
    assert result.log_v[1] == -INF
    torch.testing.assert_close(result.plan.sum(0), torch.tensor([5.0, 0.0, 10.0, 5.0]))


def test_forbidden_pairs_stay_empty():
    scores = torch.randn(60, 6, dtype=torch.float64)
    forbidden = torch.rand(60, 6) < 0.3
    forbidden[:, 0] &= torch.rand(60) < 0.5
    forbidden[torch.arange(60), torch.arange(60) % 6] = False
    result = sinkhorn(scores.masked_fill(forbidden, -INF), tol=1e-8, max_iters=1000)
    assert result.converged
    assert result.plan[forbidden].eq(0).all()
    torch.testing.assert_close(result.plan.sum(0), torch.full((6,), 10.0, dtype=torch.float64))


def test_no_plan_is_reported_as_not_converged():
    scores = torch.zeros(6, 3)
    scores[:, 1:] = -INF  # column 0 would have to take everything
    scores[0, 1:] = 0.0
    result = sinkhorn(scores)
    assert not result.converged
    assert result.plan.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (5, 1), (1, 1), (2, 0, 3), (0, 3, 4)])
def test_degenerate_shapes(shape):
    result = sinkhorn(torch.randn(shape))
    assert result.plan.shape == shape
    assert result.converged.all()
    E = shape[-1]
    torch.testing.assert_close(result.plan, torch.full(shape, 1.0 / E))
    assert result.log_v.shape == (*shape[:-2], E)


@pytest.mark.parametrize("backward", ["implicit", "unrolled", "none"])
def test_precision_of_the_plan(backward):
    scores = torch.randn(20, 4)
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        result = sinkhorn(scores.to(dtype), backward=backward)
        assert result.plan.dtype == expected
        reference = sinkhorn(scores.to(dtype).double())
        torch.testing.assert_close(result.plan.double(), reference.plan, atol=1e-6, rtol=0)


def test_float32_scores_reach_tolerances_beyond_float32_sums():
    """Column sums in float32 would stall here at an error of 1e-5 or more."""
    result = sinkhorn(torch.randn(20_000, 8), tol=1e-8, max_iters=200)
    assert result.col_error <= 1e-8


def test_noise_is_reproducible_and_added_once():
    scores = torch.randn(30, 4)
    first, second = (
        sinkhorn(scores, noise=0.5, generator=torch.Generator().manual_seed(3)).plan for _ in range(2)
    )
    assert torch.equal(first, second)
    noisy = scores + 0.5 * torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, sinkhorn(noisy).plan)


def test_same_result_every_time_and_at_any_thread_count():
    scores = torch.randn(9000, 64) * 20
    torch.set_num_threads(1)
    one = sinkhorn(scores, epsilon=0.5)
    assert torch.equal(one.plan, sinkhorn(scores, epsilon=0.5).plan)
    torch.set_num_threads(2)
    two = sinkhorn(scores, epsilon=0.5)
    assert torch.equal(two.plan, sinkhorn(scores, epsilon=0.5).plan)
    torch.testing.assert_close(one.plan, two.plan, atol=1e-6, rtol=0)


def test_cap_and_zero_tolerance():
    scores = torch.randn(30, 4) * 5
    capped = sinkhorn(scores, epsilon=0.1, max_iters=3)
    assert int(capped.iterations) == 3
    assert not capped.converged
    assert capped.row_error <= 1e-6  # it ends on a row scaling
    exact = sinkhorn(scores, tol=0.0, max_iters=37)
    assert int(exact.iterations) == 37
    assert not exact.converged or exact.col_error == 0
