"""Straight-through gradients against the formulas and finite differences; schedules and settings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monge.conversion.alignment import PAPER, AlignmentConfig, NeuronMask
from monge.conversion.alignment.estimators import choose_experts, straight_through
from monge.conversion.types import DROPPED, SHARED, Partition

ESTIMATORS = ["soft_topk", "softmax", "sigmoid"]


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = torch.rand(50, 7, requires_grad=True)
    hard = (torch.rand(50, 7) > 0.5).float()
    given_grad = torch.randn(50, 7)
    choice = straight_through(hard, soft)
    choice.backward(given_grad)
    assert torch.equal(choice, hard)  # hard + soft - soft would be off by a rounding here and there
    assert not torch.equal(hard + soft - soft, hard)
    assert torch.equal(soft.grad, given_grad)


@given(st.integers(2, 9), st.data(), st.sampled_from(ESTIMATORS))
def test_exactly_the_k_largest_are_chosen(N, data, estimator):
    k = data.draw(st.integers(1, N))
    seed = data.draw(st.integers(0, 10_000))
    logits_TN = torch.randn(6, N, generator=torch.Generator().manual_seed(seed))
    choice_TN = choose_experts(logits_TN, k, estimator)
    assert set(choice_TN.unique().tolist()) <= {0.0, 1.0}
    assert (choice_TN.sum(1) == k).all()
    least_chosen_T = logits_TN.masked_fill(choice_TN == 0, torch.inf).amin(1)
    best_other_T = logits_TN.masked_fill(choice_TN == 1, -torch.inf).amax(1)
    assert (least_chosen_T >= best_other_T).all()


def test_ties_still_give_k_experts():
    assert (choose_experts(torch.zeros(4, 6), 2, "sigmoid").sum(1) == 2).all()


def test_the_gradient_of_a_choice_is_that_of_its_formula():
    logits_TN = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight_TN = torch.randn(5, 6, dtype=torch.float64)

    (soft,) = torch.autograd.grad((choose_experts(logits_TN, 2, "softmax") * weight_TN).sum(), logits_TN)
    P = logits_TN.softmax(1)
    assert torch.allclose(soft, P * (weight_TN - (P * weight_TN).sum(1, keepdim=True)))

    (sharp,) = torch.autograd.grad((choose_experts(logits_TN, 2, "sigmoid") * weight_TN).sum(), logits_TN)
    ordered = logits_TN.detach().sort(1, descending=True).values
    s = torch.sigmoid(logits_TN - (ordered[:, 1:2] + ordered[:, 2:3]) / 2)
    assert torch.allclose(sharp, weight_TN * s * (1 - s))


def test_the_soft_top_k_moves_the_margin_and_no_common_level():
    """dz = w (g - <w, g> / <w, 1>) / t with w = x (1 - x), x the soft choice, in closed form."""
    logits_TN = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight_TN = torch.randn(5, 6, dtype=torch.float64)
    choice_TN = choose_experts(logits_TN, 2, "soft_topk", temperature=0.3)
    (grad_TN,) = torch.autograd.grad((choice_TN * weight_TN).sum(), logits_TN)
    low, high = logits_TN.detach().amin(1, keepdim=True) - 9, logits_TN.detach().amax(1, keepdim=True) + 9
    for _ in range(80):  # the level at which the soft choices sum to k, by bisection
        level_T1 = (low + high) / 2
        x_TN = torch.sigmoid((logits_TN.detach() - level_T1) / 0.3)
        above = x_TN.sum(1, keepdim=True) > 2
        low, high = torch.where(above, level_T1, low), torch.where(above, high, level_T1)
    w_TN = x_TN * (1 - x_TN)
    mean_T1 = (w_TN * weight_TN).sum(1, keepdim=True) / w_TN.sum(1, keepdim=True)
    assert torch.allclose(grad_TN, w_TN * (weight_TN - mean_T1) / 0.3)
    assert torch.allclose(grad_TN.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_all_experts_are_no_choice_and_have_no_gradient():
    logits_TN = torch.randn(3, 4, requires_grad=True)
    for estimator in ESTIMATORS:
        choice_TN = choose_experts(logits_TN, 4, estimator)
        assert torch.equal(choice_TN, torch.ones(3, 4))
        assert not choice_TN.requires_grad


def learning_mask(F=11, N=3, H=5, temperature=0.4, dtype=torch.float64) -> NeuronMask:
    """Two neurons shared, one dropped, the rest learned."""
    labels_F = torch.arange(F) % N
    labels_F[:2], labels_F[4] = SHARED, DROPPED
    mask = NeuronMask(Partition(labels_F, torch.randn(N, H)), 1, 0.5 * torch.randn(F, N)).to(dtype)
    mask.temperature = temperature
    return mask


def test_the_gradient_of_an_assignment_is_the_soft_plans_by_finite_differences():
    """<G, M> has the gradient of <G, Sinkhorn(A / tau)>, whose value is differenced here."""
    from monge.ot import sinkhorn

    mask = learning_mask()
    weight_FN = torch.randn(11, 3, dtype=torch.float64)
    routed_R = (mask.labels_F >= 0).nonzero()[:, 0]

    def soft_value(affinity_FN):
        plan = sinkhorn(affinity_FN[routed_R], epsilon=0.4, tol=1e-13, max_iters=500).plan
        return float((plan * weight_FN[routed_R]).sum())

    (mask.assignment() * weight_FN).sum().backward()
    affinity_FN, step = mask.affinity_FN.detach(), 1e-5
    for f in range(11):
        for e in range(3):
            moved = torch.zeros_like(affinity_FN)
            moved[f, e] = step
            slope = (soft_value(affinity_FN + moved) - soft_value(affinity_FN - moved)) / (2 * step)
            assert math.isclose(mask.affinity_FN.grad[f, e], slope, rel_tol=1e-3, abs_tol=1e-5)
    assert (mask.affinity_FN.grad[[0, 1, 4]] == 0).all()  # shared and dropped neurons are no part of it


@pytest.mark.parametrize("rounding", ["exact", "greedy"])
def test_the_assignment_is_hard_balanced_and_leaves_shared_and_dropped_neurons_alone(rounding):
    mask = learning_mask()
    mask.rounding = rounding
    M_FN = mask.assignment()
    routed_R = mask.labels_F >= 0
    assert torch.equal(M_FN[routed_R].argmax(1), mask.labels_F[routed_R])
    assert (M_FN[routed_R].sum(1) == 1).all()
    assert (M_FN[[0, 1, 4]] == 0).all()
    assert sorted(M_FN.sum(0).tolist()) == [2, 3, 3]
    assert mask.labels_F[[0, 1, 4]].tolist() == [SHARED, SHARED, DROPPED]


def test_a_mask_is_differentiable_through_choice_and_assignment_as_its_relaxation():
    """d<G, R M^T> = <G M, dP> + <G^T R, dM_soft>, hard values in the place of what is not differentiated."""
    mask = learning_mask()
    x_TH = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight_TF = torch.randn(7, 11, dtype=torch.float64)
    (mask(x_TH) * weight_TF).sum().backward()
    with torch.no_grad():
        R_TN, M_FN = choose_experts(x_TH @ mask.router_NH.T, 1, "softmax"), mask.assignment()
    router_NH = mask.router_NH.detach().clone().requires_grad_()
    P_TN = (x_TH.detach() @ router_NH.T).softmax(1)
    ((weight_TF @ M_FN) * P_TN).sum().backward()
    assert torch.allclose(mask.router_NH.grad, router_NH.grad)
    expected = torch.autograd.grad((mask.assignment() * (weight_TF.T @ R_TN)).sum(), mask.affinity_FN)[0]
    assert torch.allclose(mask.affinity_FN.grad, expected)
    assert x_TH.grad.abs().sum() > 0


def test_the_average_of_assignments_is_exponential_and_decides_the_frozen_labels():
    mask = learning_mask()
    expected = torch.zeros(11, 3, dtype=torch.float64)
    for seed in range(4):
        with torch.no_grad():
            mask.affinity_FN.copy_(torch.randn(11, 3, generator=torch.Generator().manual_seed(seed)))
        expected = 0.9 * expected + 0.1 * mask.assignment().detach()
        mask.remember(0.9)
    assert torch.allclose(mask.average_FN, expected)
    routed_R = (mask.labels_F >= 0).nonzero()[:, 0]
    mask.settle(averaged=True)
    from oracles import best_partition

    kept = expected[routed_R, mask.labels_F[routed_R]].sum()
    assert math.isclose(kept, best_partition(expected[routed_R]), abs_tol=1e-9)
    before = mask.labels_F.clone()
    with torch.no_grad():
        mask.affinity_FN.neg_()
    mask.remember(0.9)
    mask.settle(averaged=True)
    assert not mask.assignment().requires_grad  # the affinities have no say any more
    assert torch.equal(mask.labels_F, before)
    assert torch.allclose(mask.average_FN, expected)


def test_rates_and_temperatures_at_known_steps():
    config = AlignmentConfig(warmup=0.2)
    assert [config.rate(step, 50) for step in (0, 4, 9, 10, 30)] == pytest.approx([0.1, 0.5, 1, 1, 0.5])
    assert 0 < config.rate(49, 50) < 0.01
    assert [config.temperature(step, 50) for step in (0, 5, 10, 49)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert config.freeze_step(50) == 36
    assert AlignmentConfig(warmup=0.0).rate(0, 10) == 1
    assert AlignmentConfig(warmup=0.0).temperature(0, 10) == 1  # one step at the start
    assert AlignmentConfig(warmup=0.0).temperature(1, 10) == pytest.approx(0.1)


def test_the_paper_preset_has_the_papers_numbers():
    assert (PAPER.kl, PAPER.ce, PAPER.z, PAPER.balance) == (2.0, 1.0, 1e-3, 1e-2)
    assert (PAPER.affinity_rate, PAPER.router_rate, PAPER.weight_rate) == (5e-4, 5e-4, 0.0)
    assert (PAPER.weight_decay, PAPER.clip, PAPER.warmup) == (1e-4, 1.0, 0.2)
    assert (PAPER.temperature_start, PAPER.temperature_end, PAPER.rounding) == (1.0, 0.1, "greedy")
    assert PAPER.freeze_step(3500) == 3500
    assert PAPER.estimator == PAPER.settled_estimator == "softmax"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounding", "nearest"), ("estimator", "hard"), ("kl", -1.0), ("z", math.nan),
        ("affinity_rate", 1.5), ("warmup", 1.0), ("clip", 0.0), ("temperature_end", -0.1),
        ("freeze_at", 0.0), ("checkpoint_every", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        AlignmentConfig(**{field: value})
