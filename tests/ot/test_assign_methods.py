"""The approximate and greedy methods: quality, the fill of what is missing, and the rules they state."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import check_assignment

from monge.ot import assign
from monge.ot.assignment.approximate import accept, conditioned, propose
from monge.ot.assignment.completion import complete_assignment


def skewed(T: int, E: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(T, E, generator=generator) + torch.randn(E, generator=generator), -1)


FAMILIES = {
    "softmax": lambda T, E: skewed(T, E, 0),
    "bfloat16": lambda T, E: skewed(T, E, 1).bfloat16(),
    "integer": lambda T, E: torch.randint(0, 4, (T, E)).float(),
    "equal": lambda T, E: torch.zeros(T, E),
    "repeated rows": lambda T, E: skewed(8, E, 2).repeat(T // 8, 1),
    "one outlier": lambda T, E: skewed(T, E, 3).index_fill(0, torch.tensor([5]), 1e30),
    "forbidden": lambda T, E: torch.randn(T, E).masked_fill(torch.rand(T, E) < 0.5, -torch.inf),
}


@pytest.mark.parametrize("method", ["approximate", "greedy"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("T", "E", "k", "factor"), [(240, 16, 2, 1.0), (256, 8, 5, 1.0), (240, 12, 11, 1.0), (240, 16, 2, 1.3)]
)
def test_nothing_is_dropped_and_no_capacity_exceeded(method, family, T, E, k, factor):
    scores = FAMILIES[family](T, E)
    if family == "forbidden":
        k = min(k, 3)
        scores[:, :k] = 0.0  # enough finite scores in every row
        scores[torch.arange(T), torch.arange(T) % E] = 0.5
    answer = assign(scores, k, capacity_factor=factor, method=method)
    if answer.status == "infeasible":
        assert family == "forbidden"
        assert assign(scores, k, capacity_factor=factor).status == "infeasible"
        return
    exact = assign(scores, k, capacity_factor=factor)
    check_assignment(answer, scores, k, math.ceil(factor * T * k / E), optimal=float(exact.objective))


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_the_approximate_gap_is_small_on_ordinary_scores(factor):
    for seed in range(3):
        answer = assign(skewed(4096, 32, seed), 4, capacity_factor=factor, method="approximate")
        assert answer.gap < 2e-4
        assert (
            answer.gap < 0.05 * assign(skewed(4096, 32, seed), 4, capacity_factor=factor, method="greedy").gap
        )


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_the_approximate_gap_at_the_size_of_a_real_router(factor):
    for seed in range(4):
        assert assign(skewed(8192, 64, seed), 8, capacity_factor=factor, method="approximate").gap < 5e-5


def test_the_approximate_method_ignores_scale_and_row_offsets():
    scores = skewed(128, 8, 0).double()
    expected = assign(scores, 2, method="approximate").indices
    for changed in (
        scores * 2.0**100,
        scores * 2.0**-100,
        scores + torch.arange(128.0).unsqueeze(-1).double(),
    ):
        assert torch.equal(assign(changed, 2, method="approximate").indices, expected)


def test_conditioning_spreads_equal_rows_over_all_columns():
    work, scale = conditioned(torch.full((1, 256, 8), 7.0), torch.ones(1, 256, dtype=torch.bool))
    assert scale == 1
    first = work[0].argmax(-1).bincount(minlength=8)
    assert first.min() > 256 // 8 // 2


def test_greedy_takes_the_best_pairs_first():
    scores = torch.randn(12, 4)
    taken, loads = [set() for _ in range(12)], [0] * 4
    for flat in scores.flatten().argsort(descending=True).tolist():
        row, column = divmod(flat, 4)
        if len(taken[row]) < 2 and loads[column] < 7:
            taken[row].add(column)
            loads[column] += 1
    assert all(len(columns) == 2 for columns in taken), "choose a case that needs no completion"
    answer = assign(scores, 2, capacity=7, method="greedy")
    assert [set(row) for row in answer.indices.tolist()] == taken


def test_accept_keeps_the_highest_priorities_of_every_column():
    columns = torch.tensor([[0, 1, 0, 2, 0, 1, 2]])  # column 2 = E stands for no proposal
    priority = torch.tensor([[0.1, 0.5, 0.9, 9.0, 0.9, 0.7, 9.0]])
    accepted, room = accept(columns, priority, torch.tensor([[2, 1]]))
    assert accepted.tolist() == [[False, False, True, False, True, True, False]]
    assert room.tolist() == [[0, 0]]


def test_proposals_alone_never_exceed_capacity():
    scores, mask = torch.randn(3, 50, 6), torch.rand(3, 50) < 0.7
    capacity = torch.tensor([12, 14, 50])
    slots = propose(scores, mask, torch.zeros(3, 6), 2, capacity)
    loads = torch.nn.functional.one_hot(slots + 1, 7).sum((1, 2))[:, 1:]
    assert (loads <= capacity[:, None]).all()
    assert (slots[~mask] == -1).all()


def completed(scores: torch.Tensor, slots: list[list[int]], capacity: int) -> tuple[torch.Tensor, bool]:
    slots_BTk = torch.tensor(slots).unsqueeze(0)
    mask = torch.ones(slots_BTk.shape[:2], dtype=torch.bool)
    answer, complete = complete_assignment(scores.unsqueeze(0), slots_BTk, mask, torch.tensor([capacity]))
    return answer[0], bool(complete)


def test_completion_moves_another_row_where_the_free_column_is_already_held():
    # Row 2 holds column 2, the only one with room: somebody must move there for it. Row 1 loses least (0.5).
    scores = torch.tensor([[9.0, 8.0, 1.0], [9.0, 8.0, 7.5], [0.0, 8.5, 9.0]])
    slots, complete = completed(scores, [[0, 1], [0, 1], [2, -1]], 2)
    assert complete
    assert [set(row) for row in slots.tolist()] == [{0, 1}, {0, 2}, {2, 1}]


def test_completion_follows_a_chain_of_forbidden_pairs():
    # Every row may take its own column and the next; row 0 is short and only the last column has room.
    E = 6
    scores = torch.full((E, E), -torch.inf)
    for row in range(E):
        scores[row, row] = scores[row, max(0, row - 1)] = 1.0
    slots, complete = completed(scores, [[-1]] + [[row - 1] for row in range(1, E)], 1)
    assert complete
    assert slots.flatten().tolist() == list(range(E))


def test_completion_reports_the_impossible():
    scores = torch.tensor([[1.0, -torch.inf], [1.0, -torch.inf], [1.0, 1.0]])
    assert not completed(scores, [[0], [-1], [1]], 1)[1]


def test_completion_leaves_complete_instances_alone():
    slots = [[1, 0], [0, 1]]
    answer, complete = completed(torch.randn(2, 3), slots, 2)
    assert complete
    assert answer.tolist() == slots
