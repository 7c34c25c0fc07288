"""Cases for the exact engine: integer scores that a flow solver judges without rounding, and large families.

Shapes: T rows, E columns, k choices per row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ortools.graph.python import min_cost_flow

from monge.ot.assignment.solution import Solution


class Case(NamedTuple):
    """Scores ``whole_TE * unit``, exact in their dtype; -inf where ``forbidden_TE``."""

    whole_TE: np.ndarray  # int64
    forbidden_TE: np.ndarray
    unit: float
    dtype: type
    k: int
    capacity: int

    @property
    def scores(self) -> np.ndarray:
        return np.where(self.forbidden_TE, -np.inf, self.whole_TE * self.unit).astype(self.dtype)


def best_whole(case: Case) -> int | None:
    """The optimum in units, by OR-tools on integers; None when there is none."""
    T, E = case.whole_TE.shape
    flow = min_cost_flow.SimpleMinCostFlow()
    t, e = np.nonzero(~case.forbidden_TE)
    flow.add_arcs_with_capacity_and_unit_cost(t, T + e, np.ones(t.size, np.int64), -case.whole_TE[t, e])
    columns = np.arange(T, T + E)
    capacity = np.full(E, case.capacity)
    flow.add_arcs_with_capacity_and_unit_cost(columns, np.full(E, T + E), capacity, np.zeros(E, np.int64))
    flow.set_nodes_supplies(np.arange(T + E + 1), np.r_[np.full(T, case.k), np.zeros(E, int), -T * case.k])
    return -flow.optimal_cost() if flow.solve() == flow.OPTIMAL else None


def random_case(seed: int) -> Case:
    """A small case of one of eight families, a third with forbidden pairs, half with slack."""
    rng = np.random.default_rng(seed)
    E = int(rng.integers(1, rng.choice([4, 10, 24]) + 1))
    k = int(rng.integers(1, E + 1)) if rng.random() < 0.5 else min(E, int(rng.integers(1, 4)))
    T = int(rng.integers(1, rng.choice([4, 20, 90]) + 1))
    least = -(-T * k // E)
    capacity = (
        least if rng.random() < 0.5 else int(rng.integers(least, max(least + 1, min(T, 2 * least) + 1)))
    )
    distinct = int(rng.integers(1, 5))
    few_rows = rng.integers(-(2**20), 2**20, (distinct, E))[rng.integers(0, distinct, T)]
    whole_TE = [
        lambda: rng.integers(-(2**30), 2**30, (T, E)),  # all different
        lambda: rng.integers(0, 4, (T, E)),  # ties
        lambda: np.full((T, E), int(rng.integers(-3, 4))),  # all equal
        lambda: few_rows,  # equal rows
        lambda: 2**4 * few_rows + rng.integers(-3, 4, (T, E)),  # clusters
        lambda: np.outer(rng.integers(0, 1000, T), rng.integers(0, 1000, E)),  # one order of columns for all
        lambda: -np.abs(rng.integers(0, 1000, T)[:, None] - rng.integers(0, 1000, E)),  # points on a line
        lambda: (2.0**30 * np.exp(4 * rng.standard_normal((T, E)) - 12)).astype(np.int64),  # peaky
    ][seed % 8]()
    forbidden_TE = np.zeros((T, E), bool)
    if rng.random() < 0.35:
        forbidden_TE = rng.random((T, E)) < rng.choice([0.1, 0.4, 0.7])
        if rng.random() < 0.2:
            forbidden_TE[:, rng.integers(0, E)] = True
        for row in forbidden_TE:
            while np.count_nonzero(~row) < k:
                row[rng.integers(0, E)] = False
    narrow = np.abs(whole_TE).max() < 2**24 and rng.random() < 0.7
    unit = 2.0 ** -int(rng.integers(0, 30))
    return Case(whole_TE, forbidden_TE, unit, np.float32 if narrow else np.float64, k, capacity)


def family(name: str, T: int, E: int, seed: int = 0) -> np.ndarray:
    """Large scores, float32: ordinary ones (softmax with a bias per column) and degenerate ones."""
    rng = np.random.default_rng(seed)

    def softmax(rows: int, sigma: float = 1.0) -> np.ndarray:
        z = sigma * (rng.standard_normal((rows, E)) + rng.standard_normal(E))
        p = np.exp(z - z.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    scores = {
        "softmax": lambda: softmax(T),
        "logits": lambda: rng.standard_normal((T, E)) + rng.standard_normal(E),
        "peaky": lambda: softmax(T, 4.0),
        "integers": lambda: rng.integers(0, 4, (T, E)),
        "equal": lambda: np.ones((T, E)),
        "repeated": lambda: softmax(16)[np.arange(T) % 16],
        "clusters": lambda: softmax(16)[rng.integers(0, 16, T)] + 1e-6 * rng.standard_normal((T, E)),
        "chain": lambda: np.outer(rng.random(T), np.sort(rng.random(E))),
    }[name]()
    return scores.astype(np.float32)


def check_solution(solution: Solution, scores: np.ndarray, k: int, capacity: int) -> float:
    """Everything a solution promises but optimality; returns the size of the sums it consists of."""
    T, E = scores.shape
    scores = scores.astype(np.float64)
    indices, prices = solution.indices, solution.prices
    assert solution.status in ("optimal", "approximate")
    assert indices.shape == (T, k)
    assert indices.dtype == np.int64
    assert prices.shape == (E,)
    assert prices.dtype == np.float64
    assert (np.diff(np.sort(indices, axis=1), axis=1) > 0).all(), "a row holds a column twice"
    assert np.bincount(indices.ravel(), minlength=E).max() <= capacity, "overload"
    chosen = np.take_along_axis(scores, indices, axis=1)
    assert np.isfinite(chosen).all(), "a forbidden pair was chosen"
    step = np.diff(chosen, axis=1)
    assert ((step < 0) | ((step == 0) & (np.diff(indices, axis=1) > 0))).all(), (
        "not by falling score, lower column"
    )
    assert prices.min() >= 0
    if E * capacity == T * k:
        assert prices.min() == 0

    size = float(np.abs(chosen).sum() + capacity * prices.sum()) + 1e-300
    dual = np.partition(scores - prices, E - k, axis=1)[:, E - k :].sum() + capacity * prices.sum()
    assert abs(solution.objective - chosen.sum()) <= 1e-12 * size
    assert abs(solution.upper_bound - dual) <= 1e-12 * size, "the bound is not the dual value of the prices"
    assert solution.objective <= solution.upper_bound
    if solution.status == "optimal":
        assert solution.upper_bound - solution.objective <= 1e-12 * size
        assert solution.reason == ""
    return size
