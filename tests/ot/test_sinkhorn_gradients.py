"""Gradients of monge.ot.sinkhorn: against finite differences, unrolled iterations, and where none may flow.

Shapes: T rows, E columns.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from monge.ot import sinkhorn
from monge.ot.entropic import adjoint

INF = float("inf")


def problem(T=9, E=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(T, E, generator=generator, dtype=torch.float64)
    row_mass = torch.rand(T, generator=generator, dtype=torch.float64) + 0.2
    col_mass = torch.rand(E, generator=generator, dtype=torch.float64) + 0.2
    return scores, row_mass, col_mass * row_mass.sum() / col_mass.sum()


def plan(scores, row_mass, col_mass, backward, epsilon=0.6):
    return sinkhorn(
        scores,
        epsilon=epsilon,
        row_mass=row_mass,
        col_mass=col_mass,
        tol=1e-13,
        max_iters=5000,
        backward=backward,
    ).plan


@pytest.mark.parametrize("backward", ["implicit", "unrolled"])
def test_finite_differences_for_scores_and_both_masses(backward):
    """The masses start at equal totals; each entry is moved alone, so that the rescaling is checked too."""
    inputs = [x.requires_grad_() for x in problem()]
    assert torch.autograd.gradcheck(lambda *x: plan(*x, backward), inputs, atol=1e-7)


def test_finite_differences_along_directions_that_keep_the_totals_equal():
    scores, row_mass, col_mass = problem(seed=1)
    inputs = [x.requires_grad_() for x in (scores, torch.randn(9).double(), torch.randn(4).double())]

    def of_zero_sum_moves(scores, row_move, col_move):
        row = row_mass + 0.05 * (row_move - row_move.mean())
        col = col_mass + 0.05 * (col_move - col_move.mean())
        return plan(scores, row, col, "implicit")

    assert torch.autograd.gradcheck(of_zero_sum_moves, inputs, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_finite_differences_of_a_batch_with_mask(epsilon):
    scores = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True])

    def masked(s):
        return sinkhorn(s, epsilon=epsilon, mask=mask, tol=1e-13, max_iters=5000).plan

    assert torch.autograd.gradcheck(masked, scores, atol=1e-7)


@given(
    seed=st.integers(0, 2**16), T=st.integers(1, 40), E=st.integers(1, 9), epsilon=st.sampled_from([0.3, 1.0])
)
@settings(max_examples=40)
def test_implicit_equals_unrolled_to_convergence(seed, T, E, epsilon):
    inputs = [x.requires_grad_() for x in problem(T, E, seed)]
    weight = torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    implicit, unrolled = (
        torch.autograd.grad((plan(*inputs, backward, epsilon) * weight).sum(), inputs)
        for backward in ("implicit", "unrolled")
    )
    for ours, theirs in zip(implicit, unrolled):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


def test_implicit_gradient_in_float32_is_that_of_float64():
    scores = torch.randn(500, 16) * 2
    weight = torch.randn(500, 16)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.to(dtype, copy=True).requires_grad_()
        (sinkhorn(leaf, epsilon=0.5, tol=1e-7, max_iters=500).plan * weight).sum().backward()
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, atol=2e-5, rtol=0)


def test_no_gradient_reaches_a_shift_of_a_column_or_row():
    """The plan does not see them; softmax, in contrast, sends a gradient to a column's shift."""
    scores = torch.randn(64, 8, dtype=torch.float64)
    weight = torch.randn(64, 8, dtype=torch.float64)
    for shape in ((1, 8), (64, 1)):
        shift = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        (sinkhorn(scores + shift, tol=1e-12, max_iters=500).plan * weight).sum().backward()
        assert shift.grad.abs().max() < 1e-12
    bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    (torch.softmax(scores + bias, -1) * weight).sum().backward()
    assert bias.grad.abs().max() > 0.1


@pytest.mark.parametrize("backward", ["implicit", "unrolled"])
def test_nothing_flows_to_what_has_no_mass(backward):
    scores, row_mass, col_mass = problem(12, 5)
    scores[2] = float("nan")
    row_mass[4], col_mass[1] = 0.0, 0.0
    mask = torch.ones(12, dtype=torch.bool)
    mask[2] = False
    inputs = [x.requires_grad_() for x in (scores, row_mass, col_mass)]
    result = sinkhorn(
        scores,
        row_mass=row_mass,
        col_mass=col_mass,
        mask=mask,
        tol=1e-12,
        max_iters=1000,
        backward=backward,
    )
    grad_scores, grad_row, grad_col = torch.autograd.grad((result.plan * torch.randn(12, 5)).sum(), inputs)
    assert all(g.isfinite().all() for g in (grad_scores, grad_row, grad_col))
    assert grad_scores[[2, 4]].eq(0).all()
    assert grad_scores[:, 1].eq(0).all()
    assert grad_row[[2, 4]].eq(0).all()
    assert grad_col[1] == 0
    assert grad_scores[0].abs().max() > 1e-3


@pytest.mark.parametrize("backward", ["implicit", "unrolled"])
@pytest.mark.parametrize("epsilon", [0.01, 1.0])
@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(0, 4),
        torch.randn(1, 4, generator=torch.Generator().manual_seed(0)) * 100,
        torch.zeros(5, 1),
        torch.zeros(6, 6),
        torch.eye(6) * 60,
        torch.randn(20, 3, generator=torch.Generator().manual_seed(1)) * 60,
        torch.randn(8, 3, generator=torch.Generator().manual_seed(2)) * 1e30,
        torch.full((6, 3), 3e38),
        torch.where(torch.arange(12).view(6, 2) % 3 == 0, -INF, 0.0),
        torch.zeros(6, 4).masked_fill(torch.block_diag(torch.ones(3, 2), torch.ones(3, 2)) == 0, -INF),
    ],
    ids=["empty", "one row", "one column", "flat", "peaky", "wide", "huge", "large", "holes", "blocks"],
)
def test_never_nan(scores, epsilon, backward):
    leaf = scores.clone().requires_grad_()
    result = sinkhorn(leaf, epsilon=epsilon, backward=backward)
    (grad,) = torch.autograd.grad((result.plan * torch.randn(scores.shape)).sum(), leaf)
    for values in (result.plan, grad, result.row_error, result.col_error):
        assert values.isfinite().all()


def test_none_is_detached_and_ends_in_the_same_plan():
    scores = torch.randn(10, 3, requires_grad=True)
    detached = sinkhorn(scores, backward="none").plan
    assert not detached.requires_grad
    attached = sinkhorn(scores)
    assert attached.plan.requires_grad
    assert torch.equal(detached, attached.plan)
    assert not any(x.requires_grad for x in (attached.log_u, attached.log_v, attached.col_error))


def test_implicit_keeps_one_plan_for_backward():
    """Unrolling keeps several numbers per score and iteration; the implicit gradient one per score."""
    scores = torch.randn(256, 16, requires_grad=True)
    saved = []

    def note(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        sinkhorn(scores)
    assert sum(saved) <= scores.numel() * 4 + 8 * (256 + 16)


@pytest.mark.parametrize("backward", ["implicit", "none"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_break(backend, backward):
    col_mass = torch.rand(6) + 0.1
    mask = torch.rand(40) > 0.2

    def loss(scores_ET, col_mass):
        scores = (scores_ET * 2).T  # not contiguous
        result = sinkhorn(scores, epsilon=0.5, col_mass=col_mass, mask=mask, backward=backward)
        return (result.plan * scores).square().sum() + 0 * result.iterations, result.converged

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    outcomes = []
    for function in (loss, compiled):
        torch.manual_seed(1)
        scores = torch.randn(6, 40, requires_grad=True)
        masses = col_mass.clone().requires_grad_(backward == "implicit")
        value, converged = function(scores, masses)
        value.backward()
        assert converged
        outcomes.append((value.detach(), scores.grad, masses.grad))
    for eager, traced in zip(*outcomes):
        if eager is not None:
            torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("B", "T", "E"), [(2, 30, 5), (1, 5000, 64), (1, 513, 8), (1, 0, 3)])
def test_compiled_passes_agree_with_torch(B, T, E, threads):
    """Accelerators take torch's passes, the CPU the compiled ones."""
    torch.set_num_threads(threads)
    plan, grad = torch.rand(B, T, E), torch.randn(B, T, E)
    plan[:, ::3] = 0.0  # rows without mass
    mass, y = plan.double().sum(-1), torch.randn(B, E, dtype=torch.float64)
    passes = [
        (adjoint._totals, adjoint._scores_gradient),
        (adjoint._compiled_totals, adjoint._compiled_scores_gradient),
    ]
    results = []
    for totals, scores_gradient in passes:
        system, rows = totals(plan, grad, mass)
        results.append((system, rows, *scores_gradient(plan, grad, rows, y, 0.3)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_operators_keep_the_rules_of_torch():
    scores, row_mass, col_mass = (x.unsqueeze(0).requires_grad_() for x in problem())
    torch.library.opcheck(
        torch.ops.monge.sinkhorn.default,
        (scores, row_mass, col_mass, 0.5, 1e-4, 50),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
