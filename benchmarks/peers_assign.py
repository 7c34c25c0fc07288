"""Other ways to assign rows to columns under a capacity, for the benchmark: none of them is part of Monge.

Shapes: T rows, E columns, k choices per row, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ortools.graph.python import min_cost_flow
from scipy.optimize import linear_sum_assignment


def flow_solver(scores_TE: np.ndarray, k: int, capacity: int) -> Callable[[], float]:
    """OR-tools' ``SimpleMinCostFlow`` on scores * 2^30 as integers: a call that solves and returns the
    objective.

    The graph is built here, outside what will be timed.
    """
    T, E = scores_TE.shape
    flow = min_cost_flow.SimpleMinCostFlow()
    rows, columns = np.arange(T), np.arange(T, T + E)
    cost = -np.round(scores_TE.astype(np.float64) * 2**30).astype(np.int64)
    flow.add_arcs_with_capacity_and_unit_cost(
        np.repeat(rows, E), np.tile(columns, T), np.ones(T * E, np.int64), cost.ravel()
    )
    flow.add_arcs_with_capacity_and_unit_cost(
        columns, np.full(E, T + E), np.full(E, capacity), np.zeros(E, np.int64)
    )
    flow.set_nodes_supplies(np.arange(T + E + 1), np.r_[np.full(T, k), np.zeros(E, int), -T * k])

    def solve() -> float:
        if flow.solve() != flow.OPTIMAL:
            raise RuntimeError("OR-tools found no optimum")
        return -flow.optimal_cost() / 2**30

    return solve


def maxscore_released(scores_TE: np.ndarray, k: int, capacity: int) -> float:
    """The procedure of MaxScore's released code, as its authors describe it (arXiv 2508.12801); the
    objective.

    k = 2: rows take their first choice in order, the best column that has room (half of the capacity each);
    the second choices are one Hungarian match of the rows with the columns, each replicated as often as it
    has room, where the first choice of a row is forbidden to it.
    """
    if k != 2:
        raise ValueError(f"the released procedure is written for k = 2, got k = {k}")
    T, E = scores_TE.shape
    half = -(-capacity // 2)
    room_E, first_T = np.full(E, half), np.empty(T, np.int64)
    for t in range(T):
        first_T[t] = np.argmax(np.where(room_E > 0, scores_TE[t], -np.inf))
        room_E[first_T[t]] -= 1
    total = float(scores_TE[np.arange(T), first_T].sum(dtype=np.float64))
    rest_TE = scores_TE.astype(np.float64)
    rest_TE[np.arange(T), first_T] = -1e6
    rows, slots = linear_sum_assignment(np.repeat(rest_TE, half, axis=1), maximize=True)
    return total + float(rest_TE[rows, slots // half].sum())


def scipy_rounds(scores_TE: np.ndarray, k: int, capacity: int) -> float:
    """k rounds of ``linear_sum_assignment`` with the columns replicated C / k times; the objective."""
    copies = -(-capacity // k)
    rest_TE, total = scores_TE.astype(np.float64), 0.0
    for _ in range(k):
        rows, slots = linear_sum_assignment(np.repeat(rest_TE, copies, axis=1), maximize=True)
        total += float(rest_TE[rows, slots // copies].sum())
        rest_TE[rows, slots // copies] = -1e6
    return total
