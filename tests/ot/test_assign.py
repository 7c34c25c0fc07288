"""``assign`` against linear programs: every method, ties, forbidden pairs, slack, masks, odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import best_assignment, brute_force_assignment, check_assignment

from monge.ot import assign
from monge.ot.assignment.solution import REASONS

METHODS = ["exact", "approximate", "greedy"]
FAMILIES = ["normal", "softmax", "integer", "equal", "equal_rows", "forbidden", "bfloat16", "offset", "tiny"]


def make_scores(family: str, T: int, E: int, generator: torch.Generator) -> torch.Tensor:
    scores = torch.randn(T, E, generator=generator)
    match family:
        case "softmax":
            return torch.softmax(scores + torch.randn(E, generator=generator), -1)
        case "integer":
            return scores.round()
        case "equal":
            return torch.full((T, E), 0.3)
        case "equal_rows":
            return scores[:1].expand(T, E)
        case "forbidden":
            return torch.where(torch.rand(T, E, generator=generator) < 0.35, -torch.inf, scores)
        case "bfloat16":
            return scores.bfloat16()
        case "offset":
            return scores.double() + 1e4
        case "tiny":
            return scores * 1e-30
    return scores


def random_cases(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for case in range(count):
        T, E = integer(1, 14), integer(1, 8)
        k = integer(1, E)
        # From one short of enough to comfortable slack.
        capacity = max(1, math.ceil(T * k / E) + integer(-1, 3))
        yield make_scores(FAMILIES[case % len(FAMILIES)], T, E, generator), k, capacity


def check_against_program(scores: torch.Tensor, k: int, capacity: int) -> None:
    best = best_assignment(scores, k, capacity)
    for method in METHODS:
        answer = assign(scores, k, capacity=capacity, method=method)
        if best == -math.inf:
            assert answer.status == "infeasible", method
            assert answer.reason in REASONS.values()
            assert answer.reason
            assert (answer.indices == -1).all()
            assert answer.loads.sum() == 0
            assert answer.objective == answer.upper_bound == -torch.inf
            assert answer.gap == torch.inf
            continue
        check_assignment(answer, scores, k, capacity, optimal=best)
        if method == "exact":
            assert answer.status == "optimal"


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_agree_with_highs(seed):
    for scores, k, capacity in random_cases(72, seed):
        check_against_program(scores, k, capacity)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 108))
def test_many_random_cases_agree_with_highs(seed):
    for scores, k, capacity in random_cases(200, seed):
        check_against_program(scores, k, capacity)


@given(st.data())
@settings(max_examples=60)
def test_adversarial_small_integers_agree_with_highs(data):
    T, E = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    entry = st.sampled_from([0.0, 1.0, 2.0, -1.0, -math.inf])
    rows = data.draw(st.lists(st.lists(entry, min_size=E, max_size=E), min_size=T, max_size=T))
    k = data.draw(st.integers(1, E))
    check_against_program(torch.tensor(rows), k, data.draw(st.integers(1, T + 1)))


def test_the_program_agrees_with_brute_force():
    cases = [
        case for case in random_cases(400, 7) if math.comb(case[0].shape[1], case[1]) ** len(case[0]) < 2000
    ]
    assert len(cases) > 30
    for scores, k, capacity in cases:
        program, brute = best_assignment(scores, k, capacity), brute_force_assignment(scores, k, capacity)
        assert program == pytest.approx(brute, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 2), (1, 1, 1), (1, 5, 5), (7, 3, 3), (1, 6, 2), (5, 1, 1)])
def test_degenerate_shapes(method, T, E, k):
    scores = torch.randn(T, E)
    answer = assign(scores, k, method=method)
    check_assignment(
        answer, scores, k, math.ceil(T * k / E), optimal=best_assignment(scores, k, math.ceil(T * k / E))
    )
    assert answer.indices.shape == (T, k)
    assert answer.status == "optimal"


@pytest.mark.parametrize("method", METHODS)
def test_a_loose_capacity_gives_the_top_k_at_no_price(method):
    scores = torch.randn(40, 6)
    answer = assign(scores, 2, capacity=1000, method=method)
    torch.testing.assert_close(answer.indices, scores.topk(2).indices)
    assert answer.status == "optimal"
    assert answer.prices.eq(0).all()


def test_prices_reproduce_the_exact_assignment():
    scores = torch.randn(64, 8, dtype=torch.float64)
    answer = assign(scores, 2)
    adjusted = scores - answer.prices
    chosen = adjusted.gather(-1, answer.indices).amin(-1)
    rest = adjusted.scatter(-1, answer.indices, -torch.inf).amax(-1)
    assert (chosen >= rest - 1e-12).all()  # the top-k up to ties


@pytest.mark.parametrize(
    ("factor", "T", "E", "k", "capacity"),
    [
        (1.1, 10, 4, 4, 11),
        (1.0, 7, 3, 2, 5),
        (1.25, 512, 16, 2, 80),
        (0.1 + 0.2, 100, 10, 10, 30),
        (4 / 3, 9, 3, 1, 4),
    ],
)
def test_the_capacity_factor_is_read_as_a_decimal(factor, T, E, k, capacity):
    # In binary 1.1 * 10 is 11.000000000000002 and 0.1 + 0.2 is 0.30000000000000004.
    answer = assign(torch.zeros(T, E), k, capacity_factor=factor, method="greedy")
    assert answer.capacity == min(capacity, T)


@pytest.mark.parametrize("method", METHODS)
def test_masked_rows_take_nothing_and_may_hold_anything(method):
    scores = torch.randn(30, 5)
    mask = torch.rand(30) < 0.6
    dirty = scores.clone()
    dirty[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0, 1e30])
    answer = assign(dirty, 2, mask=mask, method=method)
    capacity = math.ceil(int(mask.sum()) * 2 / 5)
    check_assignment(answer, scores, 2, capacity, mask, optimal=best_assignment(scores[mask], 2, capacity))
    assert answer.capacity == capacity
    alone = assign(scores[mask], 2, method=method)
    assert answer.objective == pytest.approx(float(alone.objective), rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_all_rows_masked(method):
    answer = assign(torch.full((4, 3), torch.nan), 2, mask=torch.zeros(4, dtype=torch.bool), method=method)
    assert answer.status == "optimal"
    assert (answer.indices == -1).all()
    assert answer.loads.tolist() == [0, 0, 0]
    assert answer.objective == answer.upper_bound == answer.gap == 0


@pytest.mark.parametrize("method", METHODS)
def test_same_input_same_answer(method):
    scores = torch.randn(3, 200, 8).bfloat16()
    first, second = assign(scores, 2, method=method), assign(scores, 2, method=method)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.prices, second.prices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_gradients_and_layouts(dtype):
    scores = torch.randn(5, 12, dtype=torch.float64).to(dtype).T.requires_grad_()
    answer = assign(scores, 2)
    assert not answer.objective.requires_grad
    assert answer.prices.dtype == answer.objective.dtype == answer.upper_bound.dtype == torch.float64
    check_assignment(answer, scores.detach(), 2, 5, optimal=best_assignment(scores, 2, 5))
