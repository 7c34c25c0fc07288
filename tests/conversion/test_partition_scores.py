"""What is kept, shared and assigned is exactly the best by each method's own score."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from oracles import best_partition
from partition_cases import random_sample

from monge.conversion.partition import METHODS
from monge.conversion.types import DROPPED, SHARED, ExpertShape, LayerSample

SHAPE = ExpertShape(12, 4, 3, 1)  # 3 neurons shared, 3 routed experts of 3 neurons


def labels_of(name: str, sample: LayerSample, shape: ExpertShape = SHAPE) -> torch.Tensor:
    return METHODS[name].function(sample, shape, 0).labels_F


def strongest(score_F: torch.Tensor, count: int) -> set[int]:
    """The set of ``count`` indices of greatest total score, by trying them all."""
    return set(max(combinations(range(len(score_F)), count), key=lambda c: float(score_F[list(c)].sum())))


def members(labels_F: torch.Tensor, label: int) -> set[int]:
    return set((labels_F == label).nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", range(3))
def test_static_keeps_exactly_the_best(seed):
    sample = random_sample(12, 3, seed=seed)
    effect_TF = sample.hidden_TF.abs() * sample.weights.down_HF.norm(dim=0)
    kept = strongest((sample.weight_T[:, None] * effect_TF).mean(0), 9)
    labels = labels_of("static", sample)
    assert members(labels, SHARED) == kept
    assert members(labels, DROPPED) == set(range(12)) - kept


@pytest.mark.parametrize("name", ["weight_kmeans", "activation_kmeans"])
def test_the_shared_neurons_are_those_of_largest_energy(name):
    sample = random_sample(12, 3)
    energy_TF = sample.hidden_TF.square() * sample.weights.down_HF.square().sum(0)
    assert members(labels_of(name, sample), SHARED) == strongest(
        (sample.weight_T[:, None] * energy_TF).mean(0), 3
    )


def test_token_weights_count():
    sample = random_sample(12, 3, tokens=2)
    alone = [replace(sample, weight_T=weight) for weight in torch.tensor([[2.0, 0.0], [0.0, 2.0]])]
    for index, one in enumerate(alone):
        effect_F = sample.hidden_TF[index].abs() * sample.weights.down_HF.norm(dim=0)
        assert members(labels_of("static", one), SHARED) == strongest(effect_F, 9)


def test_cmoe_shares_the_neurons_marked_most():
    sample = random_sample(12, 3, tokens=301)
    marks = sample.hidden_TF.abs().topk(2, dim=1).indices  # a tenth of 12, rounded up
    rate_F = torch.bincount(marks.flatten(), minlength=12)
    assert len(rate_F.unique()) == 12
    assert members(labels_of("cmoe", sample), SHARED) == strongest(rate_F, 3)


def test_gradient_shares_what_matters_in_most_clusters_and_assigns_the_rest_optimally():
    sample = random_sample(12, 3)
    importance = sample.importance_CF
    importance[:, 5] += 1  # among the top 3 of all three clusters
    importance[:2, 8] += 2  # of two, and larger on average
    importance[0, 2] += 9  # of one only, and the largest on average
    labels = labels_of("gradient", sample)
    votes = torch.zeros(12)
    for row in importance:
        votes[row.argsort(descending=True)[:3]] += 1
    assert {5, 8} <= members(labels, SHARED)
    assert members(labels, SHARED) == strongest(votes + importance.mean(0) / 100, 3)
    rest = (labels != SHARED).nonzero().flatten()
    total = importance[labels[rest], rest].double().sum()
    assert float(total) == pytest.approx(best_partition(importance[:, rest].T), rel=1e-6)


def test_gradient_says_what_it_needs():
    sample = random_sample(12, 5)
    with pytest.raises(ValueError, match=r"\(3, 12\), got \(5, 12\): pass clusters=3"):
        labels_of("gradient", sample)
    with pytest.raises(ValueError, match="importance_CF is missing"):
        labels_of("gradient", replace(sample, importance_CF=None))


def test_random_deals_the_neurons_independently_of_their_place():
    shape = ExpertShape(60, 3, 1, 0)
    labels = labels_of("random", random_sample(60, 3), shape)
    assert not torch.equal(labels, torch.arange(60) % 3)
    assert not torch.equal(labels, torch.arange(60) // 20)
