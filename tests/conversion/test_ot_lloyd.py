"""OT-Lloyd on planted structure: each alternation is optimal, and the truth is a fixed point."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monge.conversion.partition import METHODS
from monge.conversion.router_fit import energy_of
from monge.conversion.types import SHARED, ExpertShape, FFNWeights, LayerSample

ot_lloyd = METHODS["ot_lloyd"].function


def planted(experts=4, neurons=8, tokens=600, seed=0):
    """Tokens of `experts` kinds, each exciting a group of neurons of its own; returns sample and groups."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(experts, (tokens,), generator=generator)
    width = 16
    centres = 4 * torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:experts]
    x = centres[kind] + 0.3 * torch.randn(tokens, width, generator=generator)
    group = torch.arange(experts).repeat_interleave(neurons)[
        torch.randperm(experts * neurons, generator=generator)
    ]
    up = centres[group] / 4 + 0.05 * torch.randn(len(group), width, generator=generator)
    weights = FFNWeights("gelu", up, torch.randn(width, len(group), generator=generator))
    sample = LayerSample(0, weights, x, weights.hidden(x), torch.ones(tokens))
    return sample, group


def same_up_to_names(labels, group):
    pairs = set(zip(labels.tolist(), group.tolist()))
    return len(pairs) == len(group.unique()) == len(labels.unique())


def test_planted_groups_are_found_in_most_draws():
    """Alternating minimisation: some starts end in a local optimum."""
    found = 0
    for seed in range(8):
        sample, group = planted(seed=seed)
        found += same_up_to_names(ot_lloyd(sample, ExpertShape(32, 4, 1, 0), seed).labels_F, group)
    assert found >= 5


def test_the_router_sends_tokens_to_the_experts_of_most_energy():
    sample, _ = planted()
    partition = ot_lloyd(sample, ExpertShape(32, 4, 1, 0), 0)
    chosen = (sample.x_TH @ partition.router_NH.T).argmax(1)
    energy = energy_of(sample, torch.arange(32))
    best = torch.zeros(600, 4).index_add_(1, partition.labels_F, energy).argmax(1)
    assert (chosen == best).double().mean() > 0.98


def test_the_strongest_neurons_are_shared():
    sample, _ = planted()
    strong = torch.tensor([3, 9, 17, 30])
    sample.weights.down_HF[:, strong] *= 20
    partition = ot_lloyd(sample, ExpertShape(32, 8, 3, 1), 0)
    assert (partition.labels_F == SHARED).nonzero().flatten().tolist() == strong.tolist()


@settings(max_examples=25, deadline=None)
@given(
    neurons=st.integers(6, 40),
    groups=st.integers(2, 6),
    data=st.data(),
    tokens=st.sampled_from([1, 2, 30]),
)
def test_sizes_are_balanced_whatever_the_shape(neurons, groups, data, tokens):
    active = data.draw(st.integers(1, groups))
    shared = data.draw(st.integers(0, active - 1))
    shape = ExpertShape(neurons, groups, active, shared)
    generator = torch.Generator().manual_seed(neurons)
    weights = FFNWeights(
        "gelu", torch.randn(neurons, 5, generator=generator), torch.randn(5, neurons, generator=generator)
    )
    x = torch.randn(tokens, 5, generator=generator)
    partition = ot_lloyd(LayerSample(0, weights, x, weights.hidden(x), torch.ones(tokens)), shape, 0)
    sizes = torch.bincount(partition.labels_F[partition.labels_F >= 0], minlength=shape.routed)
    assert int((partition.labels_F == SHARED).sum()) == shape.shared_neurons
    assert sizes.max() - sizes.min() <= 1
    assert sizes.max() <= shape.expert_neurons
    assert torch.isfinite(partition.router_NH).all()


def test_equal_seeds_give_equal_partitions_and_dead_neurons_do_no_harm():
    sample, _ = planted()
    sample.hidden_TF[:, :5] = 0
    shape = ExpertShape(32, 4, 2, 0)
    first, second = ot_lloyd(sample, shape, 7), ot_lloyd(sample, shape, 7)
    assert (first.labels_F == second.labels_F).all()
    assert (first.router_NH == second.router_NH).all()
