"""Measurements: losses against a direct computation, leak against each router's own claim."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from lab.made import corpus_of, random_windows
from torch.nn import functional as F

from monge.lab import CompareConfig
from monge.lab.evaluation import evaluate, mean_loss
from monge.lab.examples import window_examples
from monge.lab.leak import leak_kl_of, leak_of
from monge.lab.loads import LoadCounter, max_violation
from monge.lab.models import build_model, moe_layers, static_capacity
from monge.lab.tokenizer import load_corpus
from monge.routing import ROUTERS
from monge.workspace.text import INSTALL, PACKAGES, find_domains

NO_TEXT = any(importlib.util.find_spec(name) is None for name in PACKAGES)


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Router weights large enough that routing has preferences."""
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.router.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def real_batches() -> list[torch.Tensor]:
    """Batches of the default validation text at the size of the quick preset."""
    if NO_TEXT:
        pytest.skip(f"needs `{INSTALL}`")
    config = CompareConfig(steps=20, val_tokens=8192)
    val_NS = load_corpus(find_domains(), config).val_NS
    return list(val_NS[:, :-1].split(config.batch))


def test_the_mean_loss_is_that_of_all_tokens_at_once(make_config):
    config = make_config()
    model = build_model("topk", config, 0)
    windows_NS = random_windows(config, 11)  # the last batch is smaller
    with torch.no_grad():
        logits = model.eval()(input_ids=windows_NS[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), windows_NS[:, 1:].flatten())
    assert mean_loss(model, window_examples(windows_NS), config) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_leak_agrees_with_what_the_router_says_of_itself(router, real_batches):
    config = CompareConfig()
    model = _spread(build_model(router, config, 0))
    causal = all(layer.router.causal_train for layer in moe_layers(model).values())
    leak = leak_of(model, real_batches)
    assert leak == 0.0 if causal else 0.0 < leak < 0.5
    divergence = leak_kl_of(model, real_batches)
    assert 0 <= divergence < 1e-9 if causal else divergence > 1e-9


def test_leak_counts_exactly_the_changed_routes(make_config, monkeypatch):
    """Routers that send one token of the first half's eight elsewhere when the last token changes."""
    config = make_config()
    model = build_model("topk", config, 0)
    (layer,) = moe_layers(model).values()
    choose = type(layer.router).choose

    def peeking(self, logits_TE, batch):
        choice = choose(self, logits_TE, batch)
        last = batch.hidden_TD[config.context - 1 :: config.context]
        fourth = choice.indices_TK[3 :: config.context]
        shift = (last.sum(dim=1).view(torch.int32) & 1)[:, None]
        fourth.copy_(torch.tensor([[0, 1]]) + 2 * shift)  # {0, 1} or {2, 3}
        return choice

    monkeypatch.setattr(type(layer.router), "choose", peeking)
    windows_NS = random_windows(config, 64)
    leak = leak_of(model, list(windows_NS[:, :-1].split(4)))
    # half of the replaced second halves have another parity, and then one token of eight changes wholly
    assert leak == pytest.approx(0.5 / 8, abs=0.5 / 8 * 0.6)
    assert (
        leak * 4 * 4 * 8
    ) % 1 == 0  # 4 pairs of batches of 4 sequences with 8 tokens in their first halves


def test_own_loss_uses_prices_for_maxscore_and_training_routes_for_others(make_config):
    config = make_config(experts=8)
    windows_NS = random_windows(config)
    for router in ("maxscore", "ssr", "expert_choice", "sbase"):
        model = _spread(build_model(router, config, 0))
        routers = [layer.router for layer in moe_layers(model).values()]
        if router == "maxscore":
            routers[0].prices.copy_(torch.linspace(-1, 1, 8))
        result = evaluate(model, corpus_of(windows_NS, config), config)
        assert result["val_loss_own"] != result["val_loss"], router
        if router == "maxscore":
            assert not routers[0].eval_prices
            routers[0].eval_prices = True
            assert mean_loss(model, window_examples(windows_NS), config) == result["val_loss_own"]
    for router in ("topk", "prices", "noisy_topk", "lossfree", "quantile"):
        result = evaluate(_spread(build_model(router, config, 0)), corpus_of(windows_NS, config), config)
        assert result["val_loss_own"] == result["val_loss"], router


def test_evaluation_changes_nothing_in_the_model(make_config):
    config = make_config()
    for router in ("ssr", "maxscore", "prices", "lossfree", "quantile"):
        model = build_model(router, config, 0).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        evaluate(model, corpus_of(random_windows(config), config), config)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for layer in moe_layers(model).values():
            assert not layer.router.collected.any(), router
            assert not layer.router._forward_hooks
            assert not layer.router._forward_pre_hooks


def test_violation_and_dead_experts_count_the_whole_set(make_config):
    config = make_config(layers=2)
    model = build_model("topk", config, 0)
    first, second = moe_layers(model).values()
    with torch.no_grad():
        first.router.weight.zero_()  # ties: the same two experts take everything
        second.router.weight.normal_(generator=torch.Generator().manual_seed(0))
    result = evaluate(model, corpus_of(random_windows(config), config), config)
    loads_LE = torch.tensor(result["loads"])
    assert loads_LE[0].sort().values.tolist() == [0, 0, 0.5, 0.5]
    assert result["dead_experts"] == 2 + int((loads_LE[1] == 0).sum())
    expected = (1.0 + float(loads_LE[1].max() * 4 - 1)) / 2
    assert result["max_violation"] == pytest.approx(expected)


def test_the_counter_adds_forwards_up_and_forgets_what_was_taken(make_config):
    config = make_config()
    model = build_model("topk", config, 0)
    windows_NS = random_windows(config, 4)[:, :-1]
    with LoadCounter(model) as counter:
        model(input_ids=windows_NS[:2])
        model(input_ids=windows_NS[2:])
        loads_LE = counter.take()
        assert loads_LE.sum() == windows_NS.numel() * config.top_k
        model(input_ids=windows_NS[:1])
        assert counter.take().sum() == config.context * config.top_k
    model(input_ids=windows_NS)
    assert counter.take().shape == (0, 0)
    assert max_violation(torch.tensor([[3.0, 1, 0, 0], [1, 1, 1, 1]])).tolist() == [2.0, 0.0]
    assert max_violation(torch.zeros(0, 0)).tolist() == []


def test_a_static_capacity_is_that_of_the_layer_and_is_put_back(make_config):
    config = make_config(experts=8)
    model = _spread(build_model("topk", config, 0))
    windows_NS = random_windows(config)
    result = evaluate(model, corpus_of(windows_NS, config), config)
    for layer in moe_layers(model).values():
        layer.capacity_factor = 1.0
    dropping = mean_loss(model, window_examples(windows_NS), config)
    assert result["val_loss_cf1"] == result["val_loss_own_cf1"] == dropping
    assert result["val_loss"] != dropping
    with static_capacity(model, 8.0):  # room for every token on one expert
        assert mean_loss(model, window_examples(windows_NS), config) == pytest.approx(result["val_loss"])
    # a layer that was trained with a capacity is validated without, and in its own way with it
    capped = evaluate(model, corpus_of(windows_NS, config), config)
    assert capped["val_loss"] == pytest.approx(result["val_loss"])
    assert capped["val_loss_own"] == pytest.approx(dropping)
    assert all(layer.capacity_factor == 1.0 for layer in moe_layers(model).values())


def test_every_domain_has_its_loss_and_together_they_are_the_whole(make_config):
    config = make_config(experts=8)
    model = _spread(build_model("topk", config, 0))
    windows_NS = random_windows(config, 11)
    domain_N = torch.tensor([0, 2] * 5 + [2])
    result = evaluate(model, corpus_of(windows_NS, config, domain_N), config)
    by_domain = result["val_loss_by_domain"]
    assert by_domain.keys() == {"a", "c"}
    for name, domain in (("a", 0), ("c", 2)):
        part = window_examples(windows_NS[domain_N == domain])
        assert by_domain[name] == mean_loss(model, part, config)
    assert result["val_loss"] == pytest.approx(mean_loss(model, window_examples(windows_NS), config))
    assert result["specialisation"] > 0
    assert evaluate(model, corpus_of(windows_NS, config), config)["specialisation"] is None


def test_transport_gives_a_router_bias_no_gradient_and_softmax_does(make_config):
    config = make_config(experts=8, router_bias=3.0)
    data = corpus_of(random_windows(config, 64), config)
    figures = {}
    for router in ("topk", "ssr:iterations=200,tol=1e-9", "dense", "hash"):
        model = build_model(router, config, 0)
        figures[router.split(":")[0]] = evaluate(model, data, config)
    assert figures["topk"]["bias_gap"] == figures["ssr"]["bias_gap"] == 3.0
    assert figures["topk"]["bias_gradient"] > 1e4 * figures["ssr"]["bias_gradient"]
    for without in ("dense", "hash"):  # hash keeps its bias as it is
        assert figures[without]["bias_gap"] is figures[without]["bias_gradient"] is None
    assert evaluate(build_model("topk", make_config(), 0), data, make_config())["bias_gap"] is None
