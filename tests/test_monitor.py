"""`watch` against the definitions of its metrics, computed from the routings themselves."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from monge.moe import MoE
from monge.monitor import watch
from monge.routing import Router, make_router, step
from monge.routing.types import Routing


class Scripted(Router):
    """Gives the routings it is told, one after the other."""

    def __init__(self, *indices, num_experts, masks=None):
        super().__init__(2, num_experts, len(indices[0][0]))
        self.script = [torch.tensor(i) for i in indices]
        self.masks = masks or [None] * len(indices)
        self.calls = 0

    def forward(self, hidden, mask=None, token_ids=None):
        indices_TK, mask_T = self.script[self.calls], self.masks[self.calls]
        self.calls += 1
        logits_TE = hidden[:, :1] * torch.arange(self.num_experts)
        return Routing(indices_TK, torch.ones(indices_TK.shape), self.num_experts, logits_TE, mask=mask_T)


def run(router, hidden=None, **options):
    with watch(nn.Sequential(router), **options) as w:
        for indices_TK in router.script:
            router(torch.zeros(len(indices_TK), 2) if hidden is None else hidden)
    return w


def test_metrics_are_their_definitions():
    """Loads (3, 1, 0, 0) and then (1, 1, 2, 0): together (4, 2, 2, 0), mean 2."""
    w = run(
        Scripted([[0, 1], [0, -1], [0, -1]], [[0, 1], [2, 2]], num_experts=4), capacity_factors=(1.0, 2.0)
    )
    m = w.metrics()["layers"]["0"]
    assert m["forwards"] == 2
    assert m["tokens"] == 5
    assert m["loads"] == [4, 2, 2, 0]
    assert m["max_violation"] == 1.0
    assert m["max_violation_batch"] == pytest.approx((2.0 + 1.0) / 2)
    assert m["cv"] == pytest.approx(math.sqrt((4 + 0 + 0 + 4) / 4) / 2)
    assert m["dead_experts"] == 1
    assert m["load_entropy"] == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))
    # capacities: ceil(4 / 4) = 1 in both forwards, so 2 of 4 and 1 of 4 are above; at 2.0: 2, so 1 and 0
    assert m["drops"] == {1.0: 3 / 8, 2.0: 1 / 8}
    assert m["ot_steps"] == 0
    assert m["ms_route"] > 0


def test_routing_entropy_is_over_valid_tokens():
    mask = torch.tensor([True, False, True])
    router = Scripted([[0], [-1], [1]], num_experts=3, masks=[mask])
    hidden = torch.tensor([[0.0, 0], [9, 0], [1, 0]])
    m = run(router, hidden).metrics()["total"]
    p = torch.softmax(torch.tensor([0.0, 1, 2]), 0)
    assert m["tokens"] == 2
    assert m["routing_entropy"] == pytest.approx((math.log(3) - float((p * p.log()).sum())) / 2)


def test_infinite_logits_have_an_entropy():
    router = Scripted([[0], [1]], num_experts=3)
    router.register_forward_hook(lambda m, args, r: replace(r, logits=torch.tensor([[0, 0, -math.inf]] * 2)))
    assert run(router).metrics()["total"]["routing_entropy"] == pytest.approx(math.log(2))


def test_totals_over_layers():
    a = Scripted([[0], [0], [1]], num_experts=2)
    b = Scripted([[0], [1], [2]], num_experts=4)
    model = nn.ModuleDict({"a": nn.Sequential(a), "b": nn.Sequential(b)})
    with watch(model, capacity_factors=(1.0,)) as w:
        a(torch.zeros(3, 2))
        b(torch.zeros(3, 2))
    m = w.metrics()
    assert list(m["layers"]) == ["a", "b"]
    total = m["total"]
    assert total["loads"] == [2, 1, 1, 1, 1, 0]
    assert total["max_violation"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert total["dead_experts"] == 1
    assert total["drops"] == {1.0: 0.0}
    assert total["tokens"] == 3
    assert total["ms_route"] == pytest.approx(sum(layer["ms_route"] for layer in m["layers"].values()))


def test_two_routers_in_one_module_are_two_layers():
    first, second = (make_router("topk", dim=2, num_experts=3, top_k=1) for _ in range(2))
    with watch(nn.ModuleDict({"mlp": nn.ModuleDict({"a": first, "b": second})})) as w:
        first(torch.zeros(4, 2))
        second(torch.zeros(5, 2))
    assert {name: layer["tokens"] for name, layer in w.metrics()["layers"].items()} == {"mlp": 4, "mlp.b": 5}


def test_empty_forwards_count_for_nothing():
    router = make_router("topk", dim=2, num_experts=3, top_k=2)
    with watch(router) as w:
        router(torch.zeros(0, 2))
        assert w.metrics()["total"]["max_violation_batch"] == 0.0
        assert w.metrics()["total"]["routing_entropy"] == 0.0
        router(torch.randn(4, 2), mask=torch.zeros(4, dtype=torch.bool))
        m = w.metrics()["total"]
        assert (m["forwards"], m["tokens"], m["max_violation"], m["cv"]) == (2, 0, 0.0, 0.0)
        routing = router(torch.randn(5, 2))
    assert w.metrics()["total"]["max_violation_batch"] == pytest.approx(routing.max_violation)


class Deep(nn.Module):
    """Layers at several depths, one of them checkpointed."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": MoE(6, 5, 4, 2, router="topk")}) for _ in range(2))
        self.head = nn.Sequential(nn.Identity(), MoE(6, 5, 3, 1, router="topk"))

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block["mlp"], x, use_reentrant=False)
        return self.head(x)


def test_nested_layers_and_recomputation():
    model = Deep()
    with watch(model) as w:
        model(torch.randn(8, 6, requires_grad=True)).sum().backward()
    m = w.metrics()
    assert list(m["layers"]) == ["blocks.0.mlp", "blocks.1.mlp", "head.1"]
    assert [sum(layer["loads"]) for layer in m["layers"].values()] == [16, 16, 8]
    assert m["total"]["forwards"] == 1
    assert m["total"]["dead_experts"] == sum(load == 0 for load in m["total"]["loads"])
    assert list(w.routings) == list(m["layers"])
    for routing in w.routings.values():
        assert not routing.weights.requires_grad
        assert not routing.logits.requires_grad


def test_nothing_is_seen_outside_and_reset_forgets():
    layer = MoE(6, 5, 4, 2, router="topk")
    before = layer(torch.randn(3, 6))
    w = watch(layer)
    layer(torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="no forward was seen"):
        w.metrics()
    with w:
        assert torch.equal(layer(torch.ones(3, 6)), layer(torch.ones(3, 6)))
        w.reset()
        assert w.routings == {}
        layer(torch.randn(5, 6))
        with pytest.raises(RuntimeError, match="already entered"):
            w.__enter__()
    layer(torch.randn(3, 6))
    assert w.metrics()["total"]["tokens"] == 5
    assert before.shape == (3, 6)
    assert not layer.router._forward_hooks
    assert not layer.router._forward_pre_hooks


def test_watching_changes_no_result():
    layer = MoE(6, 5, 4, 2, router="switch")
    x = torch.randn(9, 6)
    plain = layer(x)
    with watch(layer):
        assert torch.equal(layer(x), plain)


def test_ot_steps_are_those_taken_meanwhile():
    layer = MoE(6, 5, 4, 2, router="ssr", router_options={"p": 1.0})
    layer(torch.randn(16, 6))
    step(layer)
    with watch(layer) as w:
        for _ in range(3):
            layer(torch.randn(16, 6))
            step(layer)
    assert w.metrics()["total"]["ot_steps"] == 3


def test_violation_agrees_with_the_routing_of_every_router():
    for name in ("topk", "sigmoid", "prices", "expert_choice"):
        layer = MoE(6, 5, 4, 2, router=name)
        with watch(layer) as w:
            layer(torch.randn(32, 6))
        (routing,) = w.routings.values()
        assert w.metrics()["total"]["max_violation"] == pytest.approx(routing.max_violation)


def test_a_compiled_model_is_refused_kindly():
    torch._dynamo.reset()
    layer = MoE(6, 5, 4, 2, router="topk")
    with watch(layer) as w:
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(4, 6))
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        w.metrics()


def test_bad_models_and_factors_are_named():
    with pytest.raises(ValueError, match=r"Linear has no router.*monge\.MoE"):
        watch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"capacity_factors .* got 0"):
        watch(MoE(6, 5, 4, 2), capacity_factors=(1.0, 0.0))


def test_log_writes_every_scalar_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layer = MoE(6, 5, 4, 2, router="topk")
    model = nn.Sequential(layer)
    with watch(model, tensorboard=tmp_path) as w:
        for number in (10, 20):
            model(torch.randn(8, 6))
            metrics = w.log(number)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"monge/0/max_violation", "monge/total/drops@1.25", "monge/total/ms_route"} <= set(
        events.Tags()["scalars"]
    )
    written = events.Scalars("monge/0/cv")
    assert [event.step for event in written] == [10, 20]
    assert written[-1].value == pytest.approx(metrics["layers"]["0"]["cv"], rel=1e-6)


def test_log_uses_the_writer_it_is_given():
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag] = (value, step)

    writer = Writer()
    layer = MoE(6, 5, 4, 2, router="topk")
    with watch(layer, tensorboard=writer) as w:
        layer(torch.randn(8, 6))
        w.log(7)
    assert writer.scalars["monge/total/tokens"] == (8, 7)


def test_tensorboard_errors_are_kind(monkeypatch, tmp_path):
    layer = MoE(6, 5, 4, 2)
    with pytest.raises(ValueError, match="tensorboard="):
        watch(layer).log(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        watch(layer, tensorboard=tmp_path / "file" / "runs")
    for name in [n for n in sys.modules if n == "torch.utils.tensorboard" or n.startswith("tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        watch(layer, tensorboard=tmp_path)
