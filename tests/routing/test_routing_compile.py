"""torch.compile: one graph without a break, the same routes, and no new graph per layer."""

from __future__ import annotations

import copy

import pytest
import torch
from routing_cases import CASES, NOISY, Layer, build, gradients, hidden_states
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import monge


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model: nn.Module, call, steps: int = 3) -> None:
    for seed in range(steps):
        model.zero_grad()
        torch.manual_seed(seed)
        mask = torch.ones(3, 8, dtype=torch.bool)
        mask[0, 5:] = False
        loss = call(hidden_states(3, 8, seed=seed), mask).square().mean() + monge.aux_loss(model)
        loss.backward()
        monge.step(model)


def check_equal(compiled: nn.Module, eager: nn.Module) -> None:
    for (name, a), b in zip(compiled.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    expected = gradients(eager)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")


FAST = ("ssr", "prices")  # the others compile for minutes together


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_no_graph_break_and_the_same_training(case):
    model = Layer(build(case))
    eager = copy.deepcopy(model)
    train(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    train(eager, eager)
    check_equal(model, eager)
    model.eval()
    torch.compile(model, fullgraph=True, backend="aot_eager")(hidden_states(5))


@pytest.mark.parametrize(("case", "graphs"), [("prices", 1), ("ssr_carry", 2), ("maxscore", 1)])
def test_layers_and_steps_share_a_graph(case, graphs):
    """SSR has two, one per branch; nothing else depends on the layer, the step or the values of prices."""
    counter = CompileCounterWithBackend("eager")
    more = {"p": 0.5} if case == "ssr_carry" else {}
    routers = [build(case, layer=layer, **more) for layer in range(10)]
    compiled = [torch.compile(router, fullgraph=True, backend=counter) for router in routers]
    for _ in range(4):
        for router, call in zip(routers, compiled, strict=True):
            call(hidden_states(16))
            monge.step(router)
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prices", "ssr", "maxscore", "switch"])
def test_inductor_trains_alike(case):
    model = Layer(build(case))
    eager = copy.deepcopy(model)
    train(model, torch.compile(model, fullgraph=True))
    train(eager, eager)
    check_equal(model, eager)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(CASES) - NOISY - {"hash"}))
def test_compiled_with_activation_checkpointing_counts_once(case):
    """Compiled, the recomputation is part of the backward graph."""
    model = Layer(build(case))
    eager = copy.deepcopy(model)

    def call(hidden, mask):
        return checkpoint(model, hidden, mask, use_reentrant=False)

    train(model, torch.compile(call, backend="aot_eager"))
    train(eager, eager)
    check_equal(model, eager)
