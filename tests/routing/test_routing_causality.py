"""Causality as declared, measured: does replacing the second half change routes of the first?"""

from __future__ import annotations

import pytest
import torch
from routing_cases import CASES, build, hidden_states

import monge
from monge.routing import training_routes

LENGTH = 64


def changes(router, seed: int) -> bool:
    """Whether the routes of the first half differ when the second half of the sequence is replaced."""
    first, second, other = (hidden_states(1, LENGTH // 2, seed=3 * seed + i) for i in range(3))
    halves = []
    for rest in (second, 2.0 * other + 1.0):
        torch.manual_seed(seed)  # the noise of the first tokens is then the same
        routing = router(torch.cat([first, rest], dim=1))
        halves.append((routing.indices[: LENGTH // 2], routing.weights[: LENGTH // 2]))
    same = torch.equal(halves[0][0], halves[1][0]) and torch.equal(halves[0][1], halves[1][1])
    return not same


def trained(case):
    router = build(case)
    for seed in range(3):
        router(hidden_states(1, LENGTH, seed=100 + seed))
        monge.step(router)
    return router


@pytest.mark.parametrize("case", CASES)
def test_the_declared_causality_is_the_measured(case):
    router = trained(case)
    training = [changes(router.train(), seed) for seed in range(8)]
    evaluation = [changes(router.eval(), seed) for seed in range(8)]
    with training_routes(router):
        measured = [changes(router, seed) for seed in range(8)]
    assert any(training) == (not router.causal_train)
    assert any(measured) == (not router.causal_train)
    assert any(evaluation) == (not router.causal_eval)


@pytest.mark.parametrize("case", CASES)
def test_the_docstring_speaks_of_causality(case):
    assert "ausal" in type(build(case)).__doc__


def test_training_routes_restores_even_after_an_error():
    router = build("maxscore").eval()
    with pytest.raises(ValueError, match="hidden must be"), training_routes(router):
        router(torch.zeros(2, 3))
    assert not router.training_route


@pytest.mark.parametrize("case", CASES)
def test_training_routes_collects_nothing_in_training_mode_either(case):
    router = build(case)
    with training_routes(router):
        router(hidden_states(40))
    before = {name: value.clone() for name, value in router.state_dict().items() if name != "steps"}
    monge.step(router)
    assert all(torch.equal(before[name], router.state_dict()[name]) for name in before)


@pytest.mark.parametrize(
    ("case", "balanced"), [("topk", False), ("ssr", True), ("maxscore", True), ("base", True)]
)
def test_training_routes_shows_the_method_at_work_in_eval_mode(case, balanced):
    router = build(case, bias=True).eval()
    router.bias.data[:2] = 4.0
    hidden = hidden_states(60)
    assert router(hidden).max_violation > 1
    with training_routes(router):
        assert (router(hidden).max_violation < 0.5) == balanced
