"""``assign`` on batches, under ``torch.compile``, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import check_assignment

from monge.ot import assign
from monge.ot.assignment import api, host

METHODS = ["exact", "approximate", "greedy"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_problems_one_by_one(method, threads):
    torch.set_num_threads(threads)
    scores = torch.randn(2, 3, 40, 6)
    mask = torch.rand(2, 3, 40) < 0.8
    mask[1, 2] = True
    batch = assign(scores, 2, capacity_factor=1.2, mask=mask, method=method)
    assert batch.indices.shape == (2, 3, 40, 2)
    assert batch.prices.shape == batch.loads.shape == (2, 3, 6)
    assert batch.objective.shape == batch.gap.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = assign(scores[i, j], 2, capacity_factor=1.2, mask=mask[i, j], method=method)
            check_assignment(one, scores[i, j], 2, math.ceil(1.2 * int(mask[i, j].sum()) * 2 / 6), mask[i, j])
            assert torch.equal(batch.indices[i, j], one.indices)
            assert torch.equal(batch.prices[i, j], one.prices)
            assert torch.equal(batch.report[i, j], one.report)
            assert batch.status[i][j] == one.status
            assert batch.capacity[i][j] == one.capacity


@pytest.mark.parametrize("method", METHODS)
def test_one_infeasible_problem_leaves_the_others_solved(method):
    scores = torch.randn(3, 6, 3)
    scores[1, :, 0] = -torch.inf
    scores[2, 4] = torch.tensor([0.0, -torch.inf, -torch.inf])
    answer = assign(scores, 2, method=method)
    assert answer.status[0] in ("optimal", "approximate")
    assert answer.status[1:] == ["infeasible", "infeasible"]
    assert "forbidden pairs" in answer.reason[1]
    assert "fewer than k finite" in answer.reason[2]
    assert (answer.indices[1:] == -1).all()
    assert not answer.prices.isnan().any()


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch(method):
    answer = assign(torch.empty(0, 4, 3), 1, method=method)
    assert answer.indices.shape == (0, 4, 1)
    assert answer.status == []


@pytest.mark.parametrize("method", METHODS)
def test_too_little_capacity_is_a_status_with_the_remedy(method):
    answer = assign(torch.randn(9, 3), 2, capacity=5, method=method)
    assert answer.status == "infeasible"
    assert "capacity_factor" in answer.reason
    assert answer.gap == torch.inf


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_graph_breaks(method):
    scores, mask = torch.randn(2, 32, 4), torch.rand(2, 32) < 0.9

    def route(scores, mask):
        answer = assign(scores * 2, 2, mask=mask, method=method)
        return answer.indices, answer.loads, answer.objective + answer.gap, answer.prices

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(scores, mask), route(scores, mask)):
        torch.testing.assert_close(got, expected)


def test_the_operators_pass_opcheck():
    scores, mask = torch.randn(2, 12, 4), torch.ones(2, 12, dtype=torch.bool)
    torch.library.opcheck(torch.ops.monge.assign.default, (scores, mask, 2, None, 1, 1, None, "exact"))
    slots = torch.full((2, 12, 2), -1)
    capacity = torch.tensor([6, 7])
    torch.library.opcheck(torch.ops.monge.complete_assignment.default, (scores, slots, mask, capacity))


def test_values_are_reported_where_they_cannot_be_raised():
    scores = torch.randn(2, 8, 3)
    scores[1, 2, 0] = torch.nan
    compiled = torch.compile(lambda s: assign(s, 1, method="approximate"), fullgraph=True, backend="eager")
    answer = compiled(scores)
    assert answer.status[0] != "infeasible"
    assert answer.status[1] == "infeasible"
    assert "NaN" in answer.reason[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_name_their_place(method, value):
    scores = torch.randn(2, 8, 3)
    scores[1, 2, 0] = value
    with pytest.raises(
        ValueError, match=r"scores .* 1 entries are NaN or \+inf.* problem 1, row 2, column 0"
    ):
        assign(scores, 1, method=method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must be an integer in 1\.\.E = 3, got 0"),
        ({"k": 4}, r"k must be an integer in 1\.\.E = 3, got 4"),
        ({"k": True}, "k must be an integer"),
        ({"k": 1.0}, "k must be an integer"),
        ({"capacity": 0}, "capacity must be None or an integer of at least 1, got 0"),
        ({"capacity": 2.5}, "capacity must be None or an integer"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a positive finite number, got 0.0"),
        ({"capacity_factor": math.nan}, "capacity_factor must be a positive finite number"),
        ({"max_work": -1}, "max_work must be None or a non-negative integer, got -1"),
        ({"method": "hungarian"}, "method must be one of exact, approximate, greedy, got 'hungarian'"),
        (
            {"mask": torch.ones(4, dtype=torch.bool)},
            r"mask must be bool of shape \(8,\).* got torch.bool \(4,\)",
        ),
        ({"mask": torch.ones(8)}, r"mask must be bool .* got torch.float32 \(8,\)"),
        ({"scores": torch.zeros(8)}, r"scores must be a floating-point tensor .* got torch.float32 \(8,\)"),
        (
            {"scores": torch.zeros(8, 3, dtype=torch.int64)},
            "scores must be a floating-point tensor .* torch.int64",
        ),
        ({"scores": torch.zeros(8, 0)}, r"k must be an integer in 1\.\.E = 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"scores": torch.randn(8, 3), "k": 1} | change
    with pytest.raises(ValueError, match=message):
        assign(**arguments)


@pytest.mark.parametrize("change", [{"scores": [[1.0]]}, {"mask": [True]}])
def test_wrong_kinds_of_object(change):
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        assign(**({"scores": torch.randn(1, 3), "k": 1} | change))


def test_every_method_is_listed():
    assert set(host.SOLVERS) | {"approximate"} == set(METHODS) == set(api.METHODS)
