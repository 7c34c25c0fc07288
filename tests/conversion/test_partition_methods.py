"""Every partition method: sizes, degenerate layers, determinism, and neurons whose groups are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import grouped_sample, permuted, random_sample, recovered

from monge.conversion.config import ConvertConfig
from monge.conversion.partition import METHODS
from monge.conversion.types import DROPPED, SHARED, ExpertShape, LayerSample, Partition

OURS = ["random", "weight_kmeans", "activation_kmeans", "cmoe", "gradient", "static"]
CLUSTERING = ["weight_kmeans", "activation_kmeans", "cmoe", "gradient"]


def partition(name: str, sample: LayerSample, shape: ExpertShape, seed: int = 0) -> Partition:
    """The method's answer, after the checks that every answer must pass."""
    answer = METHODS[name].function(sample, shape, seed)
    labels = answer.labels_F
    assert labels.shape == (shape.neurons,)
    assert labels.dtype == torch.int64
    if METHODS[name].dense:
        assert set(labels.tolist()) <= {SHARED, DROPPED}
        kept = round(shape.neurons * shape.active / shape.groups)
        assert int((labels == SHARED).sum()) == kept
        assert answer.router_NH is None
        return answer
    assert int((labels == SHARED).sum()) == shape.shared_neurons
    sizes = torch.bincount(labels[labels != SHARED], minlength=shape.routed)
    assert sizes.shape == (shape.routed,)
    assert int(sizes.max()) - int(sizes.min()) <= 1
    assert int(sizes.max()) == shape.expert_neurons
    assert (answer.router_NH is not None) == METHODS[name].analytic_router
    if answer.router_NH is not None:
        assert answer.router_NH.shape == (shape.routed, sample.x_TH.shape[1])
        assert bool(answer.router_NH.isfinite().all())
    return answer


@pytest.mark.parametrize("name", OURS)
@given(data=st.data())
@settings(max_examples=25)
def test_groups_are_as_equal_as_they_can_be(name, data):
    groups = data.draw(st.integers(1, 9), "groups")
    neurons = data.draw(st.integers(groups, 40), "neurons")
    active = data.draw(st.integers(1, groups), "active")
    shared = data.draw(st.integers(0, active - 1), "shared")
    shape = ExpertShape(neurons, groups, active, shared)
    tokens = data.draw(st.sampled_from([1, 2, 17]), "tokens")
    gated = data.draw(st.booleans(), "gated")
    sample = random_sample(neurons, shape.routed, tokens=tokens, gated=gated)
    first = partition(name, sample, shape, seed=3)
    again = partition(name, sample, shape, seed=3)
    assert torch.equal(first.labels_F, again.labels_F)
    if first.router_NH is not None:
        assert torch.equal(first.router_NH, again.router_NH)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", ["zero layer", "dead neurons", "duplicates", "one neuron each", "huge"])
def test_degenerate_layers(name, kind):
    shape = ExpertShape(24, 6, 4, 2)
    sample = random_sample(24, shape.routed)
    weights, importance = sample.weights, sample.importance_CF
    if kind == "zero layer":
        weights = replace(weights, **{k: 0 * getattr(weights, k) for k in ("gate_FH", "up_FH", "down_HF")})
        importance = 0 * importance
    elif kind == "dead neurons":
        weights.up_FH[5:20] = 0
        weights.gate_FH[5:20] = 0
        importance[:, 5:20] = 0
    elif kind == "duplicates":
        weights = weights.select(torch.arange(24) // 8)
        importance = importance[:, torch.arange(24) // 8]
    elif kind == "one neuron each":
        shape = ExpertShape(24, 24, 4, 2)
        importance = torch.rand(22, 24)
    elif kind == "huge":
        weights = replace(weights, up_FH=weights.up_FH * 1e15)
    hidden = weights.hidden(sample.x_TH)
    partition(name, replace(sample, weights=weights, hidden_TF=hidden, importance_CF=importance), shape)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("name", CLUSTERING)
def test_clustering_recovers_planted_groups(name, shared):
    sample, planted = grouped_sample(groups=32, size=4, shared=shared)
    shape = ExpertShape(128, 32, shared + 2, shared)
    labels = partition(name, sample, shape).labels_F
    assert torch.equal(labels == SHARED, planted == SHARED)
    # cmoe starts from the neurons that fire most, several of one group: it may stop at a lesser optimum.
    assert recovered(labels, planted) >= (0.75 if name == "cmoe" else 1.0)
    at_random = partition("random", sample, shape).labels_F
    assert recovered(at_random, planted) < 0.5


@pytest.mark.parametrize("name", ["weight_kmeans", "cmoe"])
def test_the_analytic_router_picks_the_expert_that_fires(name):
    sample, _ = grouped_sample(groups=32, size=4, shared=2)
    shape = ExpertShape(128, 32, 3, 2)
    answer = partition(name, sample, shape)
    captured_TN = torch.stack(
        [sample.hidden_TF[:, answer.labels_F == e].square().sum(1) for e in range(shape.routed)], 1
    )
    chosen_T = (sample.x_TH @ answer.router_NH.T).argmax(1)
    assert (chosen_T == captured_TN.argmax(1)).float().mean() > 0.8


@pytest.mark.parametrize("name", ["static", "gradient"])
def test_methods_without_a_lot_follow_their_neurons(name):
    sample = random_sample(48, 6)  # continuous scores, hence no ties
    shape = ExpertShape(48, 8, 4, 2)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    straight = partition(name, sample, shape).labels_F[order]
    assert torch.equal(straight, partition(name, permuted(sample, order), shape).labels_F)


@pytest.mark.parametrize("name", ["static", "gradient", "cmoe"])
def test_the_seed_plays_no_part_where_it_is_said_not_to(name):
    shape = ExpertShape(30, 5, 3, 1)
    sample = random_sample(30, shape.routed)
    assert torch.equal(partition(name, sample, shape, 0).labels_F, partition(name, sample, shape, 1).labels_F)


def test_random_differs_by_seed_and_is_fair():
    shape = ExpertShape(30, 6, 4, 2)
    sample = random_sample(30, shape.routed)
    labels = torch.stack([partition("random", sample, shape, seed).labels_F for seed in range(400)])
    for label in range(SHARED, 4):  # 2 of 6 groups shared, one group per expert
        share = (labels == label).float().mean(0)
        expected = 1 / 3 if label == SHARED else 1 / 6
        assert bool((share - expected).abs().max() < 0.1), label


def test_the_table_is_complete():
    assert set(OURS) <= set(METHODS)
    assert ConvertConfig().method not in OURS  # the default is none of the baselines
    assert [name for name, method in METHODS.items() if method.dense] == ["static"]
    for method in METHODS.values():
        assert method.citation


def test_a_shape_for_another_layer_is_refused():
    sample = random_sample(20, 4)
    for name in OURS:
        with pytest.raises(ValueError, match=r"24"):
            METHODS[name].function(sample, ExpertShape(24, 4, 2, 0), 0)
