"""Sorting slots, summing them back and capacity, against plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monge.moe.dispatch import apply_capacity, capacity_of, combine, sort_slots
from monge.routing.types import Routing


@st.composite
def slots(draw):
    """(T, K) experts with empty slots and repetitions, E, and gates with many ties."""
    T, K, E = draw(st.integers(0, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    cells = st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K)
    gates = st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=T * K, max_size=T * K)
    indices_TK = torch.tensor(draw(cells), dtype=torch.int64).view(T, K)
    weights_TK = torch.tensor(draw(gates), dtype=torch.float32).view(T, K).masked_fill(indices_TK < 0, 0)
    return indices_TK, weights_TK, E


@given(slots(), st.booleans())
def test_sort_groups_by_expert_in_token_order(case, padded):
    indices_TK, _, E = case
    T, K = indices_TK.shape
    sorted_slots = sort_slots(indices_TK, E, padded=padded)
    filled = [(e, t, k) for e in range(E) for t in range(T) for k in range(K) if indices_TK[t, k] == e]
    N = len(filled)
    assert len(sorted_slots.tokens_R) == len(sorted_slots.order_R) == (T * K if padded else N)
    assert sorted_slots.tokens_R[:N].tolist() == [t for _, t, _ in filled]
    assert sorted_slots.order_R[:N].tolist() == [t * K + k for _, t, k in filled]
    assert sorted_slots.counts_E.tolist() == [sum(f[0] == e for f in filled) for e in range(E)]
    rows = {(t, k): n for n, (_, t, k) in enumerate(filled)}
    R = len(sorted_slots.tokens_R)
    assert sorted_slots.rows_TK.tolist() == [[rows.get((t, k), R) for k in range(K)] for t in range(T)]


def test_sort_beyond_the_range_of_small_keys():
    indices_TK = torch.tensor([[40_000, 3], [39_999, 40_000]])
    assert sort_slots(indices_TK, 40_001).tokens_R.tolist() == [0, 1, 0, 1]


@given(slots())
def test_combine_sums_the_slots_of_a_token(case):
    indices_TK, weights_TK, E = case
    s = sort_slots(indices_TK, E)
    values_RH = torch.randn(len(s.tokens_R) + 1, 3, dtype=torch.float64)
    values_RH[-1] = 0
    out_TH = combine(values_RH, s.rows_TK, weights_TK)
    expected_TH = (values_RH[s.rows_TK] * weights_TK[:, :, None].double()).sum(dim=1)
    torch.testing.assert_close(out_TH, expected_TH, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combine(values_RH, s.rows_TK), values_RH[s.rows_TK].sum(dim=1))


def kept_slots(indices, weights, capacity):
    """Brute force: of every expert the first ``capacity`` slots by falling weight, then token, then slot."""
    kept = set()
    for e in range(max((i for row in indices for i in row), default=-1) + 1):
        mine = [(-weights[t][k], t, k) for t, row in enumerate(indices) for k, i in enumerate(row) if i == e]
        kept |= {(t, k) for _, t, k in sorted(mine)[:capacity]}
    return kept


@given(slots(), st.integers(0, 5))
def test_capacity_drops_the_lowest_gates_and_the_later_tokens(case, capacity):
    indices_TK, weights_TK, E = case
    T, K = indices_TK.shape
    before = Routing(indices_TK, weights_TK, E, torch.zeros(T, E))
    after = apply_capacity(before, torch.tensor(capacity))
    kept = kept_slots(indices_TK.tolist(), weights_TK.tolist(), capacity)
    for t in range(T):
        for k in range(K):
            expert, weight = int(after.indices[t, k]), float(after.weights[t, k])
            if (t, k) in kept:
                assert (expert, weight) == (int(indices_TK[t, k]), float(weights_TK[t, k]))
            else:
                assert (expert, weight) == (-1, 0.0)
    assert after.loads.max() <= capacity
    assert torch.equal(before.indices, indices_TK), "the routing that came in is not changed"


def test_capacity_keeps_the_gradient_of_what_stays():
    weights_TK = torch.tensor([[0.3], [0.7]], requires_grad=True)
    routing = Routing(torch.tensor([[0], [0]]), weights_TK, 2, torch.zeros(2, 2))
    apply_capacity(routing, 1).weights.sum().backward()
    assert weights_TK.grad.tolist() == [[0.0], [1.0]]


@given(st.integers(0, 10**6), st.integers(1, 512), st.integers(1, 400))
def test_capacity_is_the_exact_ceiling(num_slots, num_experts, percent):
    exact = math.ceil(Fraction(percent, 100) * num_slots / num_experts)
    assert capacity_of(num_slots, num_experts, percent / 100) == exact
    assert int(capacity_of(torch.tensor(num_slots), num_experts, percent / 100)) == exact


@pytest.mark.parametrize(
    ("slots", "experts", "factor", "capacity"), [(10, 1, 1.1, 11), (7, 2, 1.0, 4), (0, 3, 1.25, 0)]
)
def test_capacity_examples(slots, experts, factor, capacity):
    assert capacity_of(slots, experts, factor) == capacity
