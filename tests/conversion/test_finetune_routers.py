"""Straight-through routers, all experts at once, and low-rank updates: equal values, useful gradients."""

from __future__ import annotations

import pytest
import torch

from monge import MoE
from monge.conversion.building import GATE_SCALES, ROUTERS_OF_GATES, gate_function
from monge.conversion.low_rank import low_rank_updates
from monge.conversion.straight_through import straight_through


def random_layer(gates="standard", dtype=torch.float64, **options):
    options = {"top_k": 2, "activation": "swiglu", **options}
    router = ROUTERS_OF_GATES[gate_function(gates)]
    layer = MoE(8, 6, 5, router=router, router_options={"renormalise": True}, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.router.weight.mul_(GATE_SCALES[gates])
    return layer


@pytest.mark.parametrize("gates", GATE_SCALES)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gates_are_the_deployed_ones_to_the_last_bit(gates, top_k):
    layer = random_layer(gates, torch.float32, top_k=top_k)
    x_TD = torch.randn(200, 8)
    deployed = layer.router(x_TD)
    before = layer.router.weight.clone()
    with straight_through(layer, gates if gates != "sigmoid" else "standard"):
        trained = layer.router(x_TD)
        assert torch.equal(trained.weights.gather(1, deployed.indices), deployed.weights)
        assert (trained.weights != 0).sum() == deployed.weights.numel()
    assert torch.equal(layer.router.weight, before)
    assert torch.equal(layer.router(x_TD).weights, deployed.weights)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [0, 4])
def test_all_experts_at_once_give_the_layer_and_its_gradients(activation, bias, shared):
    layer = random_layer(activation=activation, bias=bias, shared_hidden=shared)
    x_TD = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in layer.named_parameters() if "router" not in name]

    def value_and_gradients():
        out = layer(x_TD)
        return out, torch.autograd.grad(out.sin().sum(), weights)

    expected, expected_grads = value_and_gradients()
    with straight_through(layer, "standard"):
        out, grads = value_and_gradients()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)


def test_gradients_against_finite_differences():
    layer = random_layer(activation="swiglu", bias=True)
    with straight_through(layer, "standard"):
        experts, gates_TE = layer.experts, torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        indices_TE = torch.arange(5).expand(4, 5)
        x_TD = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, g: experts(x, indices_TE, g), (x_TD, gates_TE))


def test_router_gradient_is_that_of_the_sigmoid():
    layer = random_layer("binary")  # so that the gates themselves do not depend on z
    x_TD, k = torch.randn(6, 8, dtype=torch.float64), layer.top_k
    outputs_TED = torch.stack(
        [layer.experts(x_TD, torch.full((6, 1), e), torch.ones(6, 1).double()) for e in range(5)], dim=1
    ).detach()
    with straight_through(layer, "binary") as (router,):
        z_TE = x_TD @ router.weight.detach().T
        ordered = z_TE.sort(dim=1, descending=True).values
        threshold_T1 = (ordered[:, k - 1 : k] + ordered[:, k : k + 1]) / 2
        grad_TD = torch.randn(6, 8, dtype=torch.float64)
        (grad,) = torch.autograd.grad(layer(x_TD), router.weight, grad_TD)
        s_TE = torch.sigmoid(2 * (z_TE - threshold_T1))
        slope_TE = 2 * s_TE * (1 - s_TE) / k
        expected = (slope_TE * torch.einsum("td,ted->te", grad_TD, outputs_TED)).T @ x_TD
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)
    assert (expected.abs().sum(1) > 0).all(), "every expert's row learns"


def test_the_estimate_does_not_reach_the_hidden_states():
    layer, x_TD = random_layer(), torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x_TD).sin().sum(), x_TD)
    with straight_through(layer, "standard"):
        (grad,) = torch.autograd.grad(layer(x_TD).sin().sum(), x_TD)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-10)


def test_the_router_learns_which_expert_lowers_the_loss():
    layer = random_layer(dtype=torch.float32, top_k=1)
    x_TD = torch.randn(64, 8)
    with torch.no_grad():
        wanted_TD = layer.experts(x_TD, (x_TD[:, :1] > 0).long(), torch.ones(64, 1))  # expert 1 or 0
    with straight_through(layer, "standard") as (router,):
        optimizer = torch.optim.Adam([router.weight], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            (layer(x_TD) - wanted_TD).square().mean().backward()
            optimizer.step()
    right_T = layer.router(x_TD).indices[:, 0] == (x_TD[:, 0] > 0)
    assert right_T.float().mean() > 0.9


def test_layers_get_their_modules_back_after_an_error():
    layer = random_layer()
    router, experts, names = layer.router, layer.experts, list(layer.state_dict())
    with pytest.raises(KeyError), straight_through(layer, "standard"):
        raise KeyError
    assert layer.router is router
    assert layer.experts is experts
    assert list(layer.state_dict()) == names


def test_other_routers_are_refused():
    with (
        pytest.raises(ValueError, match="routes by top-k or sigmoid"),
        straight_through(MoE(8, 6, 4, 2), "standard"),
    ):
        pass


def test_low_rank_updates_start_at_the_weights_and_merge_exactly(tiny_model, tiny_inputs):
    model = tiny_model("qwen2")
    inputs = tiny_inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        start = model(**inputs).logits
        with low_rank_updates(model, 3, seed=0) as parameters:
            assert torch.equal(model(**inputs).logits, start)
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            moved = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, moved)
        assert not torch.equal(moved, start)
    assert model.state_dict().keys() == before.keys()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    for name in changed:
        assert torch.linalg.matrix_rank(model.state_dict()[name] - before[name], rtol=1e-3) == 3


def test_low_rank_updates_of_stacked_experts():
    layer = random_layer(dtype=torch.float64)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad(), low_rank_updates(layer, 2, seed=0) as parameters:
        assert [tuple(p.shape) for p in parameters] == [(5, 2, 8), (5, 12, 2), (5, 2, 6), (5, 8, 2)]
        for parameter in parameters:
            parameter.normal_()
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        ranks_E = torch.linalg.matrix_rank(layer.state_dict()[name] - before[name], rtol=1e-9)
        assert ranks_E.tolist() == [2] * 5
    assert torch.equal(layer.router.weight, before["router.weight"])


def test_a_rank_that_is_not_low_is_refused(tiny_model):
    with pytest.raises(ValueError, match="Lower --rank"), low_rank_updates(tiny_model("llama"), 16, seed=0):
        pass
