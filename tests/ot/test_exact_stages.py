"""How the exact engine gets there: stages, bounds of work, infeasibility, determinism, threads."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from exact_cases import best_whole, check_solution, family, random_case

from monge.ot.assignment.exact import solve_exact


def same(a, b):
    return (
        np.array_equal(a.indices, b.indices)
        and np.array_equal(a.prices, b.prices)
        and (a.objective, a.upper_bound, a.stage, a.work) == (b.objective, b.upper_bound, b.stage, b.work)
    )


@pytest.mark.slow
def test_large_ordinary_cases_rarely_need_the_fallback():
    """More than 90 % end in the prices or the small repair; the units left to the repair are few."""
    stages, work = Counter(), []
    for seed in range(12):
        for name in ("softmax", "logits", "peaky"):
            for T, E, k, factor in [
                (8192, 64, 8, 1.0),
                (8192, 64, 8, 1.25),
                (4096, 32, 2, 1.0),
                (5000, 48, 1, 1.1),
            ]:
                solution = solve_exact(family(name, T, E, seed), k, int(np.ceil(factor * T * k / E)))
                assert solution.status == "optimal"
                stages[solution.stage] += 1
                work.append(solution.work / E)
    assert stages["fallback"] <= 0.1 * stages.total(), stages
    assert np.median(work) <= 1.0


@pytest.mark.parametrize(
    ("name", "most"), [("integers", 40), ("equal", 0), ("repeated", 400), ("clusters", 1200), ("chain", 1200)]
)
def test_degenerate_scores_take_bounded_work(name, most):
    """Far below one path per unit: of 16,384 units to place, what is left for the repair stays small."""
    solution = solve_exact(family(name, 4096, 32), 4, 512)
    assert solution.status == "optimal"
    assert solution.work <= most


@pytest.mark.parametrize("batch", range(4))
def test_max_work_is_kept_and_the_bound_is_valid(batch):
    stopped = 0
    for seed in range(50_000 + 75 * batch, 50_000 + 75 * (batch + 1)):
        case = random_case(seed)
        best = best_whole(case)
        limit = seed % 4
        solution = solve_exact(case.scores, case.k, case.capacity, max_work=limit)
        assert solution.work <= limit
        if best is None:
            assert solution.status == "infeasible", seed
            continue
        size = check_solution(solution, case.scores, case.k, case.capacity)
        assert solution.objective - 1e-12 * size <= best * case.unit <= solution.upper_bound + 1e-12 * size, (
            seed
        )
        if solution.status == "approximate":
            assert solution.reason == "work"
            stopped += 1
    assert stopped > 0


def test_max_work_on_a_large_case_leaves_a_small_gap():
    scores = family("chain", 2048, 32)
    stopped, full = solve_exact(scores, 4, 256, max_work=5), solve_exact(scores, 4, 256)
    assert (stopped.status, stopped.reason, stopped.work) == ("approximate", "work", 5)
    check_solution(stopped, scores, 4, 256)
    assert stopped.objective < full.objective <= stopped.upper_bound
    assert stopped.upper_bound - stopped.objective < 0.01 * full.objective
    assert same(solve_exact(scores, 4, 256, max_work=full.work), full)


def test_infeasible_by_forbidden_pairs():
    """Hall's condition fails though every row has enough columns and all slots suffice."""
    scores = np.zeros((6, 3))
    scores[:5, 2] = -np.inf  # five rows want two columns of capacity 2
    solution = solve_exact(scores, 1, 2)
    assert (solution.status, solution.reason) == ("infeasible", "pairs")
    assert solution.objective == -np.inf
    scores[4, 2] = -1e6
    solution = solve_exact(scores, 1, 2)
    assert solution.status == "optimal"
    assert solution.objective == -1e6
    assert solution.indices[4:].ravel().tolist() == [2, 2]


def test_infeasible_by_a_row_with_too_few_columns():
    scores = np.zeros((5, 3), np.float32)
    scores[2, :2] = -np.inf
    solution = solve_exact(scores, 2, 5)
    assert (solution.status, solution.reason) == ("infeasible", "row")


def test_infeasible_among_many_rows():
    scores = family("softmax", 4000, 16)
    scores[: 1 + 3 * 500, 3:] = -np.inf  # three columns of capacity 500 for 1,501 rows
    solution = solve_exact(scores, 1, 500)
    assert (solution.status, solution.reason) == ("infeasible", "pairs")
    assert solve_exact(scores[1:].copy(), 1, 500).status == "optimal"


@pytest.mark.parametrize("k", [1, 3, 5])
def test_edges(k):
    rng = np.random.default_rng(k)
    one = rng.standard_normal((1, 5)).astype(np.float32)
    solution = solve_exact(one, k, 1)
    assert solution.indices[0].tolist() == np.argsort(-one[0])[:k].tolist()
    assert solution.objective == solution.upper_bound
    rows = rng.standard_normal((7, 5)).astype(np.float32)
    roomy = solve_exact(rows, k, 7)  # capacity for all: plain top-k at price 0
    assert roomy.work == 0
    assert (roomy.prices == 0).all()
    assert np.array_equal(roomy.indices, np.argsort(-rows, axis=1)[:, :k])
    assert solve_exact(rows, 5, 7).stage == "trivial"


@pytest.mark.parametrize("name", ["softmax", "integers", "repeated", "clusters"])
def test_deterministic_and_thread_safe(name):
    problems = [family(name, 2500, 20, seed) for seed in range(6)]
    alone = [solve_exact(scores, 3, 400) for scores in problems]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda scores: solve_exact(scores, 3, 400), problems))
    assert all(same(a, b) for a, b in zip(alone, together))


def test_scores_are_left_alone():
    scores = family("integers", 600, 12)
    before = scores.copy()
    scores.flags.writeable = False
    solve_exact(scores, 2, 110)
    assert np.array_equal(scores, before)
