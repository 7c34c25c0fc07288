"""Prices and approximate assignments over two gloo processes against one process with all rows.

Shapes: T rows of all ranks, E columns, k choices per row.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from monge.ot import assign, margin_prices, quantile_prices, sinkhorn
from monge.ot.assignment.shared import quotas

RANKS = 2
MARKS = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
# Rows of each rank, E, k, capacity factor, and how much the ranks' rows differ in kind.
CASES = {
    "even": ((256, 256), 16, 2, 1.0, 0.0),
    "ranks of two kinds": ((300, 200), 16, 2, 1.0, 3.0),
    "not divisible": ((61, 38), 7, 3, 1.0, 1.0),
    "slack": ((256, 128), 16, 2, 1.25, 3.0),
    "all columns": ((9, 4), 4, 4, 1.0, 0.0),
    "fewer rows than columns": ((2, 1), 8, 2, 1.0, 1.0),
    "a rank without rows": ((64, 0), 8, 1, 1.0, 0.0),
    "no rows": ((0, 0), 4, 2, 1.0, 0.0),
    "ties": ((32, 32), 4, 1, 1.0, None),
    "too little room": ((32, 32), 4, 2, 0.5, 0.0),
}


def rows_of(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and masks of every rank."""
    counts, E, _, _, skew = CASES[name]
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(T, E, generator=generator) for T in counts]
    for rank, part in enumerate(scores):
        if skew is None:
            part.fill_(0.5)
        else:
            part[:, : E // 4] += skew * (-1) ** rank
    return scores, [torch.rand(T, generator=generator) > 0.1 for T in counts]


STEPS = {
    "margin": lambda s, k, **more: margin_prices(s, k, steps=4, **more),
    "margin, capacity": lambda s, k, **more: margin_prices(s, k, steps=4, capacity=9, **more),
    "quantile": lambda s, k, **more: quantile_prices(s, k, steps=3, **more),
    "quantile, capacity": lambda s, k, **more: quantile_prices(s, k, steps=3, capacity=9, **more),
}


def work() -> dict:
    rank, group, found = dist.get_rank(), dist.group.WORLD, {}
    for name, (_, _, k, factor, _) in CASES.items():
        scores, masks = (parts[rank] for parts in rows_of(name))
        answer = assign(scores, k, capacity_factor=factor, mask=masks, method="approximate", group=group)
        prices = {
            (step, dtype): take(scores.to(dtype), k, mask=masks, group=group)
            for step, take in STEPS.items()
            for dtype in (torch.float32, torch.float64)
        }
        figures = answer.prices, answer.loads, answer.objective, answer.upper_bound
        found[name] = answer.indices, figures, answer.status, answer.capacity, prices
    batch, _ = rows_of("even")
    both = torch.stack([batch[rank], -batch[rank]])
    found["batch"] = assign(both, 2, method="approximate", group=group).loads
    found["errors"] = [
        refusal(lambda bad=bad: assign(bad, 1, method="approximate", group=group))
        for bad in (
            torch.full((2, 3), torch.nan if rank else 0.0),
            torch.full((2, 3), -torch.inf if rank else 0.0),
        )
    ]
    found["errors"].append(refusal(lambda: assign(torch.zeros(2, 3), 1, group=group)))
    found["twice"] = second_derivative()
    return found


def refusal(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def second_derivative() -> str:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    plan = sinkhorn(scores, group=dist.group.WORLD).plan
    (grad,) = torch.autograd.grad(plan.square().sum(), scores, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def over_ranks(test):
    """Marks of a test that needs the processes."""
    for mark in MARKS:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(RANKS, work)


@over_ranks
@pytest.mark.parametrize("name", CASES)
def test_an_assignment_of_all_rows(name, ranks):
    _, E, k, factor, _ = CASES[name]
    scores, masks = (torch.cat(parts) for parts in rows_of(name))
    indices = torch.cat([found[name][0] for found in ranks])
    for first, second in zip(ranks[0][name][1], ranks[1][name][1]):
        assert torch.equal(first, second)
    _, loads, objective, bound = ranks[0][name][1]
    status, capacity = ranks[0][name][2:4]
    if name == "too little room":
        assert status == "infeasible"
        assert (indices == -1).all()
        return
    exact = assign(scores, k, capacity_factor=factor, mask=masks)
    assert capacity == exact.capacity
    assert torch.equal(loads, torch.bincount(indices[indices >= 0], minlength=E))
    assert int(loads.max()) <= capacity
    assert (indices[~masks] == -1).all()
    assert all(len(set(row)) == k and min(row) >= 0 for row in indices[masks].tolist())
    chosen = scores[masks].double().gather(1, indices[masks]).sum()
    torch.testing.assert_close(objective, chosen, rtol=1e-12, atol=1e-12)
    assert bound >= exact.objective - 1e-9
    assert exact.objective - objective <= 1e-3 * exact.objective.abs().clamp(min=1)


@over_ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_prices_of_all_rows(name, step, dtype, ranks):
    scores, masks = (torch.cat(parts) for parts in rows_of(name))
    expected = STEPS[step](scores.to(dtype), CASES[name][2], mask=masks)
    for found in ranks:
        torch.testing.assert_close(found[name][4][step, dtype], expected, rtol=0, atol=0)


@over_ranks
def test_problems_side_by_side(ranks):
    for found in ranks:
        assert found["batch"].tolist() == [[64] * 16] * 2


@over_ranks
def test_all_ranks_refuse_what_one_may_not_have(ranks):
    for found in ranks:
        for words, message in zip(
            ("NaN", "must be finite", "method='approximate'"), found["errors"], strict=True
        ):
            assert words in message


@over_ranks
def test_a_second_derivative_is_refused(ranks):
    for found in ranks:
        assert "differentiate twice" in found["twice"]


def test_quotas_fit_whatever_the_demands():
    generator = np.random.default_rng(0)
    for _ in range(400):
        R, E = generator.integers(1, 6), generator.integers(1, 7)
        k, rows_R = generator.integers(1, E + 1), generator.integers(0, 6, R)
        likely_E = generator.dirichlet(np.full(E, 0.3)) + 1e-9
        demand_RE = np.zeros((R, E), int)
        for r in range(R):
            for _ in range(rows_R[r]):
                demand_RE[r, generator.choice(E, k, replace=False, p=likely_E / likely_E.sum())] += 1
        T = int(rows_R.sum())
        capacity = min(T, -(-T * k // E) + int(generator.integers(0, 2)))
        quota_RE = quotas(demand_RE, rows_R, int(k), capacity)
        assert (quota_RE >= 0).all()
        assert (quota_RE <= rows_R[:, None]).all()
        assert (quota_RE.sum(0) <= capacity).all()
        assert (quota_RE.sum(1) == k * rows_R).all()


def test_quotas_leave_alone_what_fits():
    demand_RE = np.array([[3, 1, 0], [0, 2, 2]])
    assert quotas(demand_RE, np.array([4, 4]), 1, 3).tolist() == demand_RE.tolist()
