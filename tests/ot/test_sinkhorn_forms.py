"""The ways to one plan agree: kernel form, log form, torch, and annealed Newton, up to the widest spreads.

Shapes: B problems, T rows, E columns.
"""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from monge.ot import sinkhorn
from monge.ot.entropic import cpu_kernels, problem, solver
from monge.ot.entropic.cpu_forms import CompiledForm
from monge.ot.entropic.iteration import Stopping, hopeless, iterate
from monge.ot.entropic.log_domain import LogDomain
from monge.ot.entropic.semidual import newton

INF = float("inf")


def forms_of(scores, row_mass, epsilon):
    top = scores.double().amax(1)
    return {
        "kernel": CompiledForm(scores, row_mass, epsilon, top),
        "log": CompiledForm(scores, row_mass, epsilon),
        "torch": LogDomain(scores.double(), row_mass, epsilon),
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("B", "T", "E"), [(1, 1, 1), (2, 64, 16), (1, 65, 3), (3, 130, 17), (1, 63, 20), (1, 8200, 64)]
)
def test_sweeps_and_plans_agree(B, T, E, threads):
    torch.set_num_threads(threads)
    scores = torch.randn(B, T, E)
    row_mass = torch.rand(B, T, dtype=torch.float64) * (torch.rand(B, T) > 0.2)
    log_v = torch.randn(B, E, dtype=torch.float64)
    log_v[:, 0] = -INF if E > 1 else 0.0
    results = {
        name: (form.column_sums(log_v), *form.into_plan(log_v))
        for name, form in forms_of(scores, row_mass, 0.7).items()
    }
    for name in ("kernel", "log"):
        for ours, reference in zip(results[name], results["torch"]):
            torch.testing.assert_close(ours.double(), reference, atol=1e-6 * max(1, T / 100), rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_second_moments_agree(threads):
    torch.set_num_threads(threads)
    scores, row_mass = torch.randn(2, 5000, 6), torch.rand(2, 5000, dtype=torch.float64)
    log_v, epsilon = torch.randn(2, 6, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    forms = forms_of(scores, row_mass, 1.0)
    for ours, reference in zip(forms["log"].moments(log_v, epsilon), forms["torch"].moments(log_v, epsilon)):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-8)
    plan, _, _ = LogDomain(scores[:1].double(), row_mass[:1], 0.5).into_plan(log_v[:1])
    expected = plan[0].T @ (plan[0] / row_mass[0, :, None])
    torch.testing.assert_close(forms["log"].moments(log_v, epsilon)[1][0], expected)


def test_the_kernels_own_exponential():
    """With two columns the plan is a logistic function of the difference: a direct view of exp."""
    gaps = np.concatenate([np.linspace(0, 700, 20_001), [705.0, 708.0, 709.0, 750.0, 1e5]])
    scores = torch.from_numpy(np.stack([np.zeros_like(gaps), -gaps], -1))[None]
    plan, _, _ = CompiledForm(scores, torch.ones(1, len(gaps), dtype=torch.float64), 1.0).into_plan(
        torch.zeros(1, 2).double()
    )
    expected = np.exp(-gaps) / (1 + np.exp(-gaps))
    error = np.abs(plan[0, :, 1].numpy() - expected)
    assert (error <= 1e-15 * expected + 1e-307).all()


@given(seed=st.integers(0, 2**16), epsilon=st.sampled_from([0.2, 1.0]))
@settings(max_examples=20)
def test_forms_iterate_alike(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 70, 5, generator=generator, dtype=torch.float64)
    row_mass, target = torch.ones(1, 70).double(), torch.full((1, 5), 14.0).double()
    stopping = Stopping(1e-9, 500, torch.ones(1).double())
    found = []
    for form in forms_of(scores, row_mass, epsilon).values():
        if isinstance(form, CompiledForm):
            found.append(form.iterate(torch.zeros(1, 5).double(), target, stopping, give_up_until=0))
        found.append(iterate(form.column_sums, torch.zeros(1, 5).double(), target, stopping))
    for other in found[1:]:
        torch.testing.assert_close(other.log_v_BE, found[0].log_v_BE, atol=1e-9, rtol=0)
        assert abs(int(other.sweeps_B) - int(found[0].sweeps_B)) <= 1


FAMILIES = {
    "uniform": lambda g, T, E: torch.rand(T, E, generator=g) * 2 - 1,
    "peaky": lambda g, T, E: (torch.randn(T, E, generator=g) / 3).clamp(-1, 1),
    "duplicates": lambda g, T, E: (torch.rand(4, E, generator=g) * 2 - 1)[
        torch.randint(4, (T,), generator=g)
    ],
    "integers": lambda g, T, E: torch.randint(-1, 2, (T, E), generator=g).float(),
    "biased": lambda g, T, E: (
        torch.rand(1, E, generator=g) * 1.8 - 0.9 + 0.1 * torch.randn(T, E, generator=g)
    ).clamp(-1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("T", "E"), [(1024, 16), (200, 40), (7, 3)])
def test_right_at_spread_60_and_epsilon_005(family, T, E, dtype):
    generator = torch.Generator().manual_seed(T)
    scores = (60 * FAMILIES[family](generator, T, E)).to(dtype)
    result = sinkhorn(scores, epsilon=0.05, max_iters=200)
    assert result.converged
    plan = result.plan.double()
    assert (plan.sum(-1) - 1).abs().max() <= 1e-6
    assert (plan.sum(-2) - T / E).abs().max() <= 1e-4 + 1e-6 * T / E
    # Optimality: the plan has the form u exp(S / epsilon) v, entry by entry.
    rebuilt = torch.exp(result.log_u[:, None] + scores.double() / 0.05 + result.log_v)
    torch.testing.assert_close(plan, rebuilt, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_newton_agrees_with_the_log_form(family, epsilon):
    scores = 10 * FAMILIES[family](torch.Generator().manual_seed(3), 90, 6).double()[None]
    form = CompiledForm(scores, torch.ones(1, 90).double(), epsilon)
    top, target = scores.amax(1), torch.full((1, 6), 15.0).double()
    stopping = Stopping(1e-10, 100_000, torch.ones(1).double())
    steps = newton(form, target.log(), top, target, stopping, epsilon=epsilon, spread=20.0)
    plain = form.iterate(target.log() - top / epsilon, target, stopping, give_up_until=0)
    assert steps.errors_B <= 1e-10
    assert plain.errors_B <= 1e-10
    assert steps.spent < 60
    exact = LogDomain(scores, torch.ones(1, 90).double(), epsilon)
    torch.testing.assert_close(
        exact.into_plan(steps.log_v_BE)[0], exact.into_plan(plain.log_v_BE)[0], atol=1e-8, rtol=0
    )


def test_newton_and_iterations_that_look_at_the_error_every_ten_sweeps():
    """What an accelerator runs: torch's form, and the host asking rarely."""
    scores = (torch.rand(2, 120, 5, dtype=torch.float64) * 2 - 1) * torch.tensor([1.0, 20.0]).view(2, 1, 1)
    mass, target = torch.ones(2, 120).double(), torch.full((2, 5), 24.0).double()
    form, top = LogDomain(scores, mass, 0.2), scores.amax(1)
    start = target.log() - top / 0.2
    often = Stopping(1e-9, 3000, torch.ones(2).double())
    rarely = Stopping(1e-9, 3000, torch.ones(2).double(), check_every=10)
    expected = CompiledForm(scores, mass, 0.2).iterate(start, target, often, give_up_until=0)
    by_sweeps = iterate(form.column_sums, start, target, rarely)
    by_steps = newton(form, target.log(), top, target, rarely, epsilon=0.2, spread=40.0)
    for found in (by_sweeps, by_steps):
        assert (found.errors_B <= 1e-9).all()
        assert found.spent % 10 == 0
        gauge = (found.log_v_BE - expected.log_v_BE).mean(-1, keepdim=True)
        torch.testing.assert_close(found.log_v_BE - gauge, expected.log_v_BE, atol=1e-6, rtol=0)
    assert (by_sweeps.sweeps_B - expected.sweeps_B).abs().max() <= 1  # counted to the sweep all the same


def test_surveys_agree():
    scores = torch.randn(2, 30, 4)
    scores[0, :, 2] = -INF
    scores[1, 3, 1] = -INF
    mass = torch.rand(2, 30, dtype=torch.float64) * (torch.rand(2, 30) > 0.3)
    mass[1, 3] = 1.0
    scores[mass == 0] = float("nan")
    compiled, plain = problem._survey_compiled(scores, mass), problem._survey_torch(scores, mass)
    torch.testing.assert_close(compiled[:, :8], plain[:, :8], rtol=0, atol=0)
    assert compiled[:, 8:].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    none = torch.empty(1, 0, 4)
    assert problem._survey_torch(none, torch.empty(1, 0).double())[0, :8].eq(-INF).all()


@pytest.mark.gpu
@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_accelerator_agrees_with_cpu(epsilon):
    scores = (torch.rand(2, 300, 8) * 2 - 1) * 20
    weight, found = torch.randn(2, 300, 8), []
    for device in ("cpu", torch.accelerator.current_accelerator()):
        leaf = scores.to(device, copy=True).requires_grad_()
        result = sinkhorn(leaf, epsilon=epsilon, tol=1e-6, max_iters=300)
        assert result.converged.all()
        (result.plan * weight.to(device)).sum().backward()
        found.append((result.plan.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_newton_takes_over_exactly_when_plain_iterations_would_miss(monkeypatch):
    calls = []
    monkeypatch.setattr(solver, "newton", lambda *args, **kw: calls.append(1) or newton(*args, **kw))
    scores = (torch.rand(500, 8) * 2 - 1) * 20
    assert sinkhorn(scores, epsilon=5.0).converged
    assert not calls
    assert sinkhorn(scores, epsilon=0.05).converged
    assert len(calls) == 1
    sinkhorn(scores, epsilon=0.05, tol=0.0)
    sinkhorn(scores, epsilon=0.05, max_iters=20)
    sinkhorn(scores, epsilon=0.05, max_iters=50, backward="unrolled")
    assert len(calls) == 1


def test_newton_that_does_not_finish_never_makes_it_worse():
    scores = (torch.rand(300, 12, dtype=torch.float64) * 2 - 1) * 60
    errors = [float(sinkhorn(scores, epsilon=0.005, max_iters=n).col_error) for n in (8, 50, 60, 150)]
    assert errors == sorted(errors, reverse=True)
    assert all(math.isfinite(e) for e in errors)


def test_a_tolerance_below_rounding_ends_before_the_cap():
    scores = (torch.rand(200, 8, dtype=torch.float64) * 2 - 1) * 20
    result = sinkhorn(scores, epsilon=0.05, tol=1e-18, max_iters=100_000)
    assert not result.converged
    assert result.col_error < 1e-10
    assert int(result.iterations) < 1000


def test_prediction_of_the_remaining_sweeps():
    """An error that halves every sweep needs 10 more to fall from 1e-1 to 1e-4."""
    falling = {"error": 1e-1, "before": 1.6, "span": 4, "step": 20, "tol": 1e-4}
    assert not hopeless(**falling, max_iters=30)
    assert hopeless(**falling, max_iters=29)
    assert hopeless(error=0.5, before=0.5, span=4, step=20, tol=1e-4, max_iters=10**9)
    assert not hopeless(error=0.5, before=0.5, span=4, step=5, tol=1e-4, max_iters=30)


def test_kernel_form_is_used_for_narrow_scores_only(monkeypatch):
    chosen = []

    class Spy(CompiledForm):
        def __init__(self, *args):
            super().__init__(*args)
            chosen.append(self.as_kernel)

    monkeypatch.setattr(solver, "CompiledForm", Spy)
    scores = torch.rand(50, 4)
    sinkhorn(scores, epsilon=0.05)
    sinkhorn(scores, epsilon=0.02, max_iters=20)
    sinkhorn(scores, epsilon=0.05, col_mass=torch.tensor([1.0, 1.0, 1.0, 1e-12]), max_iters=20)
    sinkhorn(scores + torch.tensor([0.0, 0.0, 0.0, 1e3]), epsilon=0.05)  # a column's shift does not count
    scores[0, 0] = -INF
    sinkhorn(scores)
    assert chosen == [True, False, False, True, False]


def test_every_tile_is_as_wide_as_the_kernels_assume():
    assert cpu_kernels.TILE == 4 * cpu_kernels._LANES
