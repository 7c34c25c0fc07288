"""A divided FFN as a MoE layer: the dense FFN with all experts on, the chosen neurons otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monge.conversion.building import GATE_SCALES, chosen_gates, describe_moe, empty_moe, make_moe
from monge.conversion.types import DROPPED, SHARED, ExpertShape, FFNWeights, Partition
from monge.moe import MoE
from monge.moe.activations import ACTIVATIONS

H = 6


def ffn(neurons=13, activation="swiglu", bias=False, dtype=torch.float64) -> FFNWeights:
    def draw(*size):
        return torch.randn(*size, dtype=dtype)

    gated = ACTIVATIONS[activation].gated
    return FFNWeights(
        activation,
        draw(neurons, H),
        draw(H, neurons),
        draw(neurons, H) if gated else None,
        draw(neurons) if gated and bias else None,
        draw(neurons) if bias else None,
        draw(H) if bias else None,
    )


def divide(shape: ExpertShape, seed=0) -> Partition:
    """Random labels: the shared neurons, and the others as evenly as they go."""
    routed = shape.neurons - shape.shared_neurons
    labels = torch.cat([torch.full((shape.shared_neurons,), SHARED), torch.arange(routed) % shape.routed])
    return Partition(labels[torch.randperm(shape.neurons, generator=torch.Generator().manual_seed(seed))])


def summed(weights: FFNWeights, labels_F, chosen_TK, x_TH, top_k):
    """The chosen experts' neurons and the shared ones, each with gate 1, by masks on the dense FFN."""
    on_TF = (labels_F[None, :, None] == chosen_TK[:, None, :]).any(dim=2) | (labels_F == SHARED)
    out = (weights.hidden(x_TH) * on_TF) @ weights.down_HF.T
    return out if weights.down_bias_H is None else out + weights.down_bias_H


@given(
    neurons=st.integers(3, 20),
    groups=st.integers(2, 8),
    data=st.data(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    bias=st.booleans(),
)
def test_all_experts_on_is_the_dense_ffn(neurons, groups, data, activation, bias):
    groups = min(groups, neurons)
    shared = data.draw(st.integers(0, groups - 1))
    shape = ExpertShape(neurons, groups, groups, shared)
    torch.manual_seed(neurons)
    weights = ffn(neurons, activation, bias)
    moe = make_moe(weights, divide(shape), shape, torch.zeros(shape.routed, H).double())
    assert moe.top_k == moe.num_experts == groups - shared
    x = torch.randn(9, H, dtype=torch.float64)
    torch.testing.assert_close(moe(x), weights(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("gates", "tol"), [("binary", 1e-9), ("standard", 0.2), ("sigmoid", 0.2)])
def test_the_chosen_neurons_are_summed(gates, tol, shared, bias):
    """Binary gates are 1 to rounding, the others within about 2^-5 times the spread of z."""
    shape = ExpertShape(13, 6, shared + 2, shared)
    weights, router = ffn(bias=bias), torch.randn(shape.routed, H).double()
    partition = divide(shape)
    moe = make_moe(weights, partition, shape, router, gates=gates)
    x = torch.randn(50, H, dtype=torch.float64)
    x = x / (x @ router.T).std()
    chosen = (x @ router.T).topk(2, dim=1).indices
    expected = summed(weights, partition.labels_F, chosen, x, 2)
    assert (moe(x) - expected).norm() <= tol * expected.norm()
    routing = moe.router(x)
    assert torch.equal(routing.indices.sort(dim=1).values, chosen.sort(dim=1).values)
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(50).double())
    z_TK = (x @ router.T).gather(1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen_gates(z_TK, gates))
    if gates == "sigmoid":
        scores_TK = torch.sigmoid(z_TK / 16)
        torch.testing.assert_close(routing.weights, scores_TK / scores_TK.sum(dim=1, keepdim=True))
    if gates == "standard":
        torch.testing.assert_close(routing.weights, torch.softmax(z_TK / 32, dim=1))


def test_each_neuron_appears_once_and_padding_is_zero():
    shape = ExpertShape(13, 4, 3, 1)
    weights = replace(ffn(bias=True), up_FH=torch.arange(1, 14).double()[:, None].expand(13, H))
    partition = divide(shape)
    moe = make_moe(weights, partition, shape, torch.randn(3, H).double())
    I, S = moe.experts.hidden, shape.shared_neurons
    assert (I, S) == (4, 3)
    up = moe.experts.gate_up_proj[:, I:, 0].detach()
    for e in range(3):
        mine = torch.where(partition.labels_F == e)[0]
        assert up[e, : len(mine)].tolist() == (mine + 1).tolist()
        for weight in (up[e], moe.experts.gate_up_proj_bias[e, I:], moe.experts.down_proj[e].T):
            assert (weight[len(mine) :] == 0).all()
    shared = moe.shared.input_linear.weight[S:, 0].tolist()
    assert sorted([*shared, *up[up > 0].tolist()]) == list(range(1, 14))


def test_scales_are_exact_powers_of_two():
    shape, router = ExpertShape(12, 4, 2, 0), torch.randn(4, H)
    weights = ffn(12, dtype=torch.float32)
    for gates, scale in GATE_SCALES.items():
        moe = make_moe(weights, divide(shape), shape, router, gates=gates)
        assert torch.equal(moe.router.weight / scale, router)
        assert moe.experts.down_proj.dtype == torch.float32


def test_building_draws_no_random_numbers():
    shape, weights = ExpertShape(12, 4, 2, 1), ffn(12)
    partition, router = divide(shape), torch.zeros(3, H)
    state = torch.get_rng_state()
    make_moe(weights, partition, shape, router)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("gates", list(GATE_SCALES))
@pytest.mark.parametrize("bias", [False, True])
def test_a_description_makes_the_same_layer(bias, gates):
    shape = ExpertShape(13, 6, 4, 2)
    weights, router = ffn(activation="gelu", bias=bias), torch.randn(4, H).double()
    moe = make_moe(weights, divide(shape), shape, router, gates=gates)
    twin = empty_moe(describe_moe(moe))
    assert all(weight.is_meta for weight in twin.parameters())
    twin.load_state_dict(moe.state_dict(), assign=True)
    x = torch.randn(5, H, dtype=torch.float64)
    assert torch.equal(twin(x), moe(x))
    assert describe_moe(twin) == describe_moe(moe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "prices"}, "Prices"),
        ({"router": "topk", "router_options": {"bias": True}}, "bias=True"),
        ({"router": "topk", "capacity_factor": 1.0}, "capacity_factor=1.0"),
        ({"router": "topk", "router_options": {"renormalise": False}}, "sum to 1"),
    ],
)
def test_only_converted_layers_are_described(options, message):
    with pytest.raises(ValueError, match=message):
        describe_moe(MoE(H, 5, 4, 2, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": "soft"}, "gates must be one of standard, binary, sigmoid; got 'soft'"),
        ({"labels": [0, 1, 2, DROPPED] * 3}, "3 of 12 .* DROPPED.*narrow"),
        ({"labels": [0, 1, 2, 5] * 3}, r"\[0, 4\).*\[5\]"),
        ({"labels": [0, 1, 2, -3] * 3}, r"\[-3\]"),
        ({"labels": [0, 1, 2, 3, 3, 3] * 2}, "up to 6 in an expert"),
        ({"labels": [0, 1, 2, SHARED] * 3}, "3 shared neurons"),
        ({"labels": [0, 1, 2, 3] * 2}, "12 neurons.*8,.* labels"),
        ({"router": torch.zeros(3, H)}, r"\(N=4, H=6\), got \(3, 6\)"),
        ({"router": torch.full((4, H), float("nan"))}, "NaN"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    shape = ExpertShape(12, 4, 2, 0)
    labels = torch.tensor(change.get("labels", [0, 1, 2, 3] * 3))
    router = change.get("router", torch.zeros(4, H))
    with pytest.raises(ValueError, match=message):
        make_moe(ffn(12), Partition(labels), shape, router, gates=change.get("gates", "standard"))
