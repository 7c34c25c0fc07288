"""MaxScore: the optimum, exact balance, the three gates, kept prices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import hidden_states
from scipy.optimize import linprog

import monge
from monge.ot import soft_topk
from monge.routing import make_router


def maxscore(num_experts: int = 6, top_k: int = 2, spread: float = 3.0, **options):
    router = make_router("maxscore", dim=8, num_experts=num_experts, top_k=top_k, **options)
    with torch.no_grad():
        weight = torch.randn(num_experts, 8, generator=torch.Generator().manual_seed(7))
        router.weight.copy_(weight * spread / 8**0.5)
    return router


def optimum(scores_TE: np.ndarray, k: int) -> float:
    """The linear program of the docstring, by HiGHS."""
    T, E = scores_TE.shape
    rows = np.kron(np.eye(T), np.ones(E))
    columns = np.kron(np.ones(T), np.eye(E))
    capacity = -(-T * k // E)
    result = linprog(
        -scores_TE.ravel(), A_eq=rows, b_eq=[k] * T, A_ub=columns, b_ub=[capacity] * E, bounds=(0, 1)
    )
    return -result.fun


@pytest.mark.parametrize(("scores", "of"), [("softmax", lambda z: z.softmax(1)), ("logits", lambda z: z)])
@pytest.mark.parametrize("T", [12, 31])
def test_training_routes_are_the_optimum(scores, of, T):
    router = maxscore(scores=scores)
    routing = router(hidden_states(T))
    values = of(routing.logits.detach()).double()
    total = values.gather(1, routing.indices).sum().item()
    assert total == pytest.approx(optimum(values.numpy(), 2), abs=1e-5)
    assert int(routing.loads.max()) <= -(-T * 2 // 6)


@given(
    per_expert=st.integers(1, 20),
    num_experts=st.integers(2, 9),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
    method=st.sampled_from(["exact", "approximate"]),
)
def test_the_training_violation_is_exactly_zero_when_divisible(per_expert, num_experts, top_k, seed, method):
    top_k = min(top_k, num_experts)
    T = per_expert * num_experts  # E divides T k
    routing = maxscore(num_experts, top_k, method=method)(hidden_states(T, seed=seed))
    assert routing.max_violation == 0.0
    assert (routing.indices >= 0).all()


def test_each_sequence_is_balanced_on_its_own():
    hidden = hidden_states(4, 12)
    hidden[0] += 2.0  # sequences of different content
    routing = maxscore(per="sequence")(hidden)
    for sequence in routing.indices.reshape(4, -1):
        assert sequence.bincount(minlength=6).tolist() == [4] * 6
    together = maxscore()(hidden).indices.reshape(4, -1)
    assert any(s.bincount(minlength=6).tolist() != [4] * 6 for s in together)


def test_a_masked_sequence_is_balanced_by_its_valid_tokens():
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 6:] = False
    mask[2] = False
    router = maxscore(per="sequence")
    routing = router(hidden_states(3, 12), mask)
    assert routing.indices.reshape(3, -1)[1][:12].bincount(minlength=6).tolist() == [2] * 6
    assert (routing.indices.reshape(3, -1)[2] == -1).all()
    assert router.collected[-1] == 18
    alone = [maxscore()(hidden_states(3, 12)[0]).prices, maxscore()(hidden_states(3, 12)[1, :6]).prices]
    torch.testing.assert_close(routing.prices, (12 * alone[0] + 6 * alone[1]) / 18)


def test_capacity_factor_leaves_slack():
    hidden = hidden_states(120)
    free = maxscore()(hidden).logits.softmax(1)
    totals = []
    for factor in (1.0, 1.5, 6.0):
        routing = maxscore(capacity_factor=factor)(hidden)
        assert int(routing.loads.max()) <= 40 * factor
        totals.append(free.gather(1, routing.indices).sum().item())
    assert totals[0] < totals[1] <= totals[2]
    assert totals[2] == pytest.approx(free.topk(2).values.sum().item(), rel=1e-6)


def test_renormalised_gates():
    routing = maxscore()(hidden_states(24))
    probs = routing.logits.softmax(1).gather(1, routing.indices)
    torch.testing.assert_close(routing.weights, probs / probs.sum(1, keepdim=True))


def test_annealed_gates_follow_the_released_schedule():
    router = maxscore(gates="annealed", top_k=3)
    for step, factor in ((0, 4.0), (15_000, 2.5), (30_000, 1.0), (90_000, 1.0)):
        router.steps.fill_(step)
        routing = router(hidden_states(24))
        expected = routing.logits.softmax(1).gather(1, routing.indices)
        expected = expected * torch.tensor([1.0, factor, factor])
        torch.testing.assert_close(routing.weights, expected)
    router.anneal_from, router.anneal_steps = 2.0, 10
    router.steps.fill_(5)
    routing = router.eval()(hidden_states(24))
    probs = routing.logits.softmax(1).gather(1, routing.indices)
    torch.testing.assert_close(routing.weights[:, 1:], 1.5 * probs[:, 1:])


def test_annealing_advances_with_the_steps():
    router = maxscore(gates="annealed", anneal_steps=2)
    sums = []
    for _ in range(4):
        sums.append(router(hidden_states(24)).weights.sum().item())
        monge.step(router)
    assert sums[0] > sums[1] > sums[2] == sums[3]


def test_soft_topk_gates():
    router = maxscore(gates="soft_topk", temperature=0.3)
    routing = router(hidden_states(24))
    relaxed = soft_topk(routing.logits.softmax(1) - routing.prices, 2, temperature=0.3).gather(
        1, routing.indices
    )
    torch.testing.assert_close(routing.weights, relaxed / relaxed.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    routing.weights[:, 0].sum().backward()
    assert router.weight.grad.norm() > 0.01


def test_kept_prices_reproduce_the_assignment_and_serve_at_inference():
    router = maxscore(bias=True, momentum=0.0, spread=1.0)
    router.bias.data[:2] = 2.0
    hidden = hidden_states(600)
    assigned = router(hidden)
    monge.step(router)
    router.eval()
    plain = router(hidden)
    assert plain.prices is None
    router.eval_prices = True
    priced = router(hidden)
    torch.testing.assert_close(priced.prices, assigned.prices)
    flips = (priced.indices.sort(1).values != assigned.indices.sort(1).values).any(1).sum()
    assert flips <= 6  # ties: an optimal basis has at most E - 1 fractional tokens
    assert priced.max_violation < 0.05 < 1.0 < plain.max_violation
    with torch.no_grad():
        router.prices.zero_()  # "prices zeroed at evaluation"
    assert router(hidden).max_violation > 1.0


def test_prices_are_an_exponential_average_over_steps():
    router = maxscore(momentum=0.75)
    expected = torch.zeros(6)
    for seed in range(3):
        expected = 0.75 * expected + 0.25 * router(hidden_states(60, seed=seed)).prices
        monge.step(router)
    torch.testing.assert_close(router.prices, expected)


def test_the_gshard_loss_of_the_released_code():
    """0.01 * E^2 * mean_e(mean p * mean top-1 mask)."""
    router = maxscore(coefficient=0.01)
    routing = router(hidden_states(60))
    first = torch.nn.functional.one_hot(routing.indices[:, 0], 6).float()
    probs = routing.logits.softmax(1)
    expected = 0.01 * 36 * (probs.mean(0) * first.mean(0)).mean()
    torch.testing.assert_close(routing.aux_loss, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.5}, "capacity_factor must be finite and at least 1, got 0.5"),
        ({"per": "token"}, "per must be one of 'batch', 'sequence'"),
        ({"gates": "hard"}, "gates must be one of"),
        ({"method": "greedy"}, "method must be one of"),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"anneal_steps": 0}, "anneal_steps must be finite and at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        maxscore(**options)


def test_without_flow_it_is_plain_top_k_with_the_gates_asked_for():
    hidden = hidden_states(31)
    plain, flowing = maxscore(flow=False), maxscore()
    assert (plain.causal_train, flowing.causal_train) == (True, False)
    trained = plain(hidden)
    assert torch.equal(trained.indices, maxscore().eval()(hidden).indices)  # inference of the other
    assert torch.equal(trained.weights, maxscore().eval()(hidden).weights)
    assert trained.max_violation > 0.5 > flowing(hidden).max_violation
    monge.step(plain)
    assert not plain.prices.any()
    assert plain.steps == 1
    annealed = maxscore(flow=False, gates="annealed", anneal_from=4.0, coefficient=0.01)(hidden)
    probs_TE = annealed.logits.softmax(1)
    expected = probs_TE.gather(1, annealed.indices) * torch.tensor([1.0, 4.0])
    assert torch.allclose(annealed.weights, expected)
    assert annealed.aux_loss > 0
