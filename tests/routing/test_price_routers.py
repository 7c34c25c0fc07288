"""The routers with carried prices: what chooses, what weighs, how b moves, and that evaluation keeps it."""

from __future__ import annotations

import copy

import pytest
import torch
from routing_cases import hidden_states

import monge
from monge.ot import margin_prices, quantile_prices
from monge.routing import make_router
from monge.routing.prices import Prices

PRICED = ["prices", "quantile", "lossfree"]


def stressed(name: str, bias: float = 3.0, **options):
    """A router whose bias overloads two of six experts, as in the stress experiment."""
    router = make_router(name, dim=8, num_experts=6, top_k=2, bias=True, **options)
    with torch.no_grad():
        router.weight.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(7)) / 8**0.5)
        router.bias[:2] = bias
    return router


def scores_of(routing, kind):
    logits = routing.logits.detach()
    return {"logits": logits, "softmax": logits.softmax(1), "sigmoid": logits.sigmoid()}[kind]


def settle(router, steps: int = 40, tokens: int = 400) -> None:
    for seed in range(steps):
        router(hidden_states(tokens, seed=seed))
        monge.step(router)


def check_evaluation_uses_the_prices(router) -> None:
    """A trained router is balanced in evaluation, by the top-k of S - b with the b of its state dict."""
    settle(router)
    router.eval()
    routing = router(hidden_states(2000, seed=1000))
    expected = (scores_of(routing, router.scores) - router.state_dict()["prices"]).topk(2, dim=1).indices
    assert torch.equal(routing.indices, expected)
    torch.testing.assert_close(routing.prices, router.state_dict()["prices"])
    assert routing.max_violation < 0.3


@pytest.mark.parametrize("name", PRICED)
def test_evaluation_uses_the_prices(name):
    router = stressed(name, **({"rate": 0.05} if name == "lossfree" else {}))
    assert router(hidden_states(2000)).max_violation > 1.5
    check_evaluation_uses_the_prices(router)
    resumed = stressed(name)
    resumed.load_state_dict(router.state_dict())
    resumed.eval()
    assert torch.equal(resumed(hidden_states(99)).indices, router(hidden_states(99)).indices)


class Dropped(Prices):
    """The mistake: b steers training alone, and is zero at evaluation."""

    def choose(self, logits_TE, batch):
        if self.training:
            return super().choose(logits_TE, batch)
        kept = self.prices.clone()
        try:
            self.prices.zero_()
            return super().choose(logits_TE, batch)
        finally:
            self.prices.copy_(kept)


def test_the_check_sees_prices_zeroed_at_evaluation():
    router = stressed("prices")
    router.__class__ = Dropped
    with pytest.raises(AssertionError):
        check_evaluation_uses_the_prices(router)


def test_training_and_evaluation_route_alike():
    for name in PRICED:
        router = stressed(name)
        settle(router, steps=5)
        hidden = hidden_states(200, seed=500)
        a, b = router(hidden), router.eval()(hidden)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)


def test_gates_priced_and_raw():
    for gates, minus in (("priced", 1.0), ("raw", 0.0)):
        router = stressed("prices", gates=gates)
        settle(router, steps=3)
        routing = router(hidden_states(50))
        chosen = (routing.logits - minus * routing.prices).gather(1, routing.indices)
        torch.testing.assert_close(routing.weights, chosen.softmax(1))
        assert routing.prices.abs().max() > 0.5


def test_priced_gates_are_continuous_where_the_choice_flips():
    """Where one expert replaces another both weigh the same, so no gate jumps."""
    router = make_router("prices", dim=3, num_experts=3, top_k=2)
    router.weight.data.copy_(torch.eye(3))
    router.prices.copy_(torch.tensor([0.0, 1.0, -1.0]))
    below, above = (torch.tensor([[5.0, 3.0 + d, 1.0]]) for d in (-1e-6, 1e-6))
    a, b = router(below), router(above)
    assert a.indices[0].tolist() == [0, 2]
    assert b.indices[0].tolist() == [0, 1]
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_free_scores", ["softmax", "sigmoid", "logits"])
def test_gates_of_the_relatives_come_from_the_raw_scores(loss_free_scores):
    router = stressed("lossfree", scores=loss_free_scores)
    settle(router, steps=3)
    routing = router(hidden_states(50))
    scores = scores_of(routing, "softmax" if loss_free_scores == "logits" else loss_free_scores)
    chosen = scores.gather(1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(1, keepdim=True))


def test_prices_move_by_half_a_margin_step_on_the_logits():
    router = stressed("prices")
    before = router.prices.clone()
    first, second = router(hidden_states(300, seed=1)), router(hidden_states(100, seed=2))
    assert torch.equal(router.prices, before)  # forward only collects
    proposals = [margin_prices(r.logits.detach(), 2, prices=before) for r in (first, second)]
    monge.step(router)
    expected = 0.5 * before + 0.5 * (0.75 * proposals[0] + 0.25 * proposals[1])
    torch.testing.assert_close(router.prices, expected)


def test_quantile_moves_to_the_quantile_prices_of_the_scores():
    router = stressed("quantile", momentum=0.25)
    routing = router(hidden_states(300))
    expected = 0.75 * quantile_prices(routing.logits.detach().softmax(1), 2)
    monge.step(router)
    torch.testing.assert_close(router.prices, expected)


def test_lossfree_moves_by_the_sign_of_the_overload_of_all_micro_batches():
    router = stressed("lossfree", rate=0.125)
    loads = sum(router(hidden_states(t, seed=t)).loads for t in (100, 7, 300))
    monge.step(router)
    assert torch.equal(router.prices, 0.125 * torch.sign(loads - loads.float().mean()))


def test_a_kept_routing_keeps_its_prices():
    router = stressed("prices")
    routing = router(hidden_states(100))
    before = routing.prices.clone()
    monge.step(router)
    assert torch.equal(routing.prices, before)
    assert not torch.equal(router.prices, before)


def test_prices_follow_a_drift_and_do_not_wander_without_one():
    router = stressed("prices")
    settle(router, steps=30)
    settled = router.prices.clone()
    settle(router, steps=30)
    assert (router.prices - settled).abs().max() < 0.3
    router.bias.data = router.bias.data.flip(0)
    settle(router, steps=10)
    assert router.eval()(hidden_states(2000, seed=99)).max_violation < 0.3
    assert router.prices[-1] > router.prices[0] + 1


def test_small_batches_are_averaged_not_forgotten():
    """With 8 tokens a step no batch tells the loads; the average of prices over steps still does."""
    router = stressed("prices", momentum=0.9)
    settle(router, steps=300, tokens=8)
    assert router.eval()(hidden_states(2000, seed=9999)).max_violation < 0.6


def test_frozen_prices_are_no_parameters_and_get_no_gradient():
    router = stressed("prices")
    assert [name for name, _ in router.named_parameters()] == ["weight", "bias"]
    twin = copy.deepcopy(router)
    router(hidden_states(40)).weights[:, 0].sum().backward()
    assert router.weight.grad.norm() > 0
    assert not twin.prices.requires_grad


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prices", {"gates": "softmax"}, "gates must be one of 'priced', 'raw'"),
        ("prices", {"momentum": 1.5}, "momentum must lie in"),
        ("quantile", {"scores": "probs"}, "scores must be one of 'softmax', 'sigmoid', 'logits'"),
        ("lossfree", {"rate": float("nan")}, "rate must be finite and not negative"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        stressed(name, **options)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_prices_on_other_scores_choose_by_them_and_weigh_with_them(scores):
    router = make_router(
        "prices", dim=8, num_experts=4, top_k=2, scores=scores, gates="raw", renormalise=False
    )
    router.prices.copy_(torch.tensor([0.2, 0.0, -0.1, 0.0]))
    hidden = torch.randn(32, 8) * 20
    routing = router.eval()(hidden)
    scored = routing.logits.sigmoid() if scores == "sigmoid" else routing.logits.softmax(-1)
    chosen = (scored - router.prices).topk(2).indices
    assert torch.equal(routing.indices, chosen)
    assert torch.allclose(routing.weights, scored.gather(1, chosen))
    with pytest.raises(ValueError, match="gates='raw'"):
        make_router("prices", dim=8, num_experts=4, top_k=2, scores=scores)
