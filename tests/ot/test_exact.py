"""The exact engine against OR-tools on integers and against HiGHS: every objective is the optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_cases import Case, best_whole, check_solution, family, random_case
from oracles import best_assignment

from monge.ot.assignment.exact import solve_exact

BATCH = 100


@pytest.mark.parametrize("batch", range(17))
def test_objective_is_the_optimum_of_integer_flow(batch):
    """1,700 cases: ties, equal rows, clusters, forbidden pairs, slack, k = E, T = 1, nothing divisible."""
    feasible = 0
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        case = random_case(seed)
        solution, best = solve_exact(case.scores, case.k, case.capacity), best_whole(case)
        if best is None:
            assert (solution.status, solution.reason) == ("infeasible", "pairs"), seed
            assert (solution.indices == -1).all()
            continue
        feasible += 1
        assert solution.status == "optimal", seed
        size = check_solution(solution, case.scores, case.k, case.capacity)
        reached = int(np.take_along_axis(case.whole_TE, solution.indices, axis=1).sum())
        # Scores and sums of small integers are exact; of large ones the order of 1e-13 may be lost.
        assert abs(reached - best) * case.unit <= 1e-13 * size, seed
    assert feasible > BATCH // 2


@pytest.mark.parametrize("batch", range(4))
def test_objective_is_the_optimum_of_the_linear_program(batch):
    for seed in range(batch * 30, (batch + 1) * 30):
        rng = np.random.default_rng(seed)
        T, E = int(rng.integers(1, 40)), int(rng.integers(2, 12))
        k = int(rng.integers(1, E + 1))
        capacity = max(-(-T * k // E), int(rng.integers(1, T + 1)))
        scores = rng.standard_normal((T, E)) * 10.0 ** rng.integers(-8, 8)
        scores[rng.random((T, E)) < 0.05] = -np.inf
        scores = scores[(scores > -np.inf).sum(1) >= k]
        if len(scores) == 0:
            continue
        solution = solve_exact(np.ascontiguousarray(scores), k, capacity)
        best = best_assignment(torch.from_numpy(scores), k, capacity)
        if solution.status == "infeasible":
            assert best == -np.inf, seed
            continue
        size = check_solution(solution, scores, k, capacity)
        assert abs(solution.objective - best) <= 1e-9 * size, seed


@pytest.mark.parametrize("name", ["softmax", "peaky", "integers", "equal", "repeated", "clusters", "chain"])
@pytest.mark.parametrize(
    ("T", "E", "k", "factor"), [(3000, 24, 3, 1.0), (2600, 17, 2, 1.3), (300, 40, 7, 1.01)]
)
def test_large_families_carry_their_certificate(name, T, E, k, factor):
    """The check recomputes D(b) from the prices over all rows: objective = D(b) proves the optimum."""
    scores, capacity = family(name, T, E), int(np.ceil(factor * T * k / E))
    solution = solve_exact(scores, k, capacity)
    assert solution.status == "optimal"
    check_solution(solution, scores, k, capacity)


@pytest.mark.parametrize("bits", [23, 26, 40])
def test_float64_scores_are_solved_in_float64(bits):
    """Differences at and below the resolution of float32 decide, and are decided."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        few_rows = rng.integers(0, 2**bits, (3, 8))[rng.integers(0, 3, 400)]
        # All prices but the first are near 8: scores are rounded in float32 where values S - b hardly are.
        whole = few_rows + rng.integers(0, 16, (400, 8)) + 2 ** (bits + 3) * (np.arange(8) > 0)
        case = Case(whole, np.zeros(whole.shape, bool), 2.0**-bits, np.float64, 2, 100)
        solution = solve_exact(case.scores, 2, 100)
        check_solution(solution, case.scores, 2, 100)
        reached = int(np.take_along_axis(case.whole_TE, solution.indices, axis=1).sum())
        assert reached == best_whole(case)


def test_values_at_the_edge_of_float32():
    rng = np.random.default_rng(1)
    ordinary = rng.standard_normal((100, 6)).astype(np.float32)
    for scale in (2.0**100, 2.0**126, 2.0**-120):
        scores = np.clip(ordinary, -1.5, 1.5) * np.float32(scale)
        small = solve_exact(scores / np.float32(scale), 2, 34)
        solution = solve_exact(scores, 2, 34)
        assert np.isclose(solution.objective / scale, small.objective, rtol=1e-12, atol=0)
    # A finite "never" is taken as the score it is. The last two columns are open to all.
    never = ordinary.copy()
    never[:, :4][rng.random((100, 4)) < 0.4] = np.finfo(np.float32).min
    solution = solve_exact(never, 2, 40)
    forbidden = solve_exact(np.where(never < -1e30, -np.inf, never).astype(np.float32), 2, 40)
    assert solution.status == forbidden.status == "optimal"
    assert np.isclose(solution.objective, forbidden.objective, rtol=1e-12)
