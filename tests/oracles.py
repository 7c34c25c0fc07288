"""Exact oracles, independent of the code under test: linear programs by HiGHS, brute force, POT.

``best_*`` return optimal values, ``check_*`` assert every property an answer promises.
Shapes: T rows, E columns, k choices per row.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from monge.ot import Assignment


def best_assignment(scores: Tensor, k: int, capacity: int) -> float:
    """Optimal value of the k-assignment of (T, E) scores by HiGHS; -inf when there is none."""
    return _transport_value(scores, np.full(scores.shape[0], k), 0, capacity)


def best_partition(affinity: Tensor) -> float:
    """Optimal value of a partition into sizes floor(F/E) or ceil(F/E) by HiGHS; -inf when there is none."""
    F, E = affinity.shape
    return _transport_value(affinity, np.ones(F), F // E, -(-F // E))


def _transport_value(scores: Tensor, row_sums: np.ndarray, least: int, most: int) -> float:
    """max <x, s>, 0 <= x <= 1, with given row sums, column sums in [least, most]; vertices are integral."""
    s = scores.detach().double().cpu().numpy()
    T, E = s.shape
    if T == 0:
        return 0.0
    t, e = np.nonzero(s > -np.inf)
    if t.size == 0:
        return -np.inf
    scale = np.abs(s[t, e]).max() or 1.0  # HiGHS' tolerances are absolute
    ones, n = np.ones(t.size), np.arange(t.size)
    rows = sparse.csr_matrix((ones, (t, n)), shape=(T, t.size))
    columns = sparse.csr_matrix((ones, (e, n)), shape=(E, t.size))
    answer = linprog(
        -s[t, e] / scale,
        A_eq=rows,
        b_eq=row_sums,
        A_ub=sparse.vstack([columns, -columns]),
        b_ub=np.r_[np.full(E, most), np.full(E, -least)],
        bounds=(0, 1),
        method="highs",
    )
    if answer.status == 2:
        return -np.inf
    assert answer.status == 0, answer.message
    return -float(answer.fun) * scale


def brute_force_assignment(scores: Tensor, k: int, capacity: int) -> float:
    """The same value by trying every choice of every row; for C(E, k)^T up to some 10^5."""
    s = scores.detach().double().cpu().numpy()
    T, E = s.shape
    best = -np.inf
    for choice in product(list(combinations(range(E), k)), repeat=T):
        flat = [e for columns in choice for e in columns]
        if T == 0 or np.bincount(flat, minlength=E).max() <= capacity:
            best = max(best, sum(s[t, e] for t, columns in enumerate(choice) for e in columns))
    return float(best)


def dual_value(scores: Tensor, prices: Tensor, k: int, capacity: int) -> float:
    """``sum_t (sum of the k largest of s_t - b) + capacity * sum b`` in float64."""
    b = prices.double()
    return float((scores.double() - b).topk(k, dim=-1).values.sum() + capacity * b.sum())


def check_assignment(
    answer: Assignment,
    scores: Tensor,
    k: int,
    capacity: int,
    mask: Tensor | None = None,
    *,
    optimal: float | None = None,
) -> None:
    """Feasibility, order, loads, objective and certificate of one (T, E) problem with a solution.

    ``optimal`` is the value to be reached (status "optimal") or not to be exceeded (status "approximate").
    """
    T, E = scores.shape
    mask = torch.ones(T, dtype=torch.bool) if mask is None else mask
    assert answer.status in ("optimal", "approximate"), (answer.status, answer.reason)
    assert answer.indices.shape == (T, k)
    assert answer.indices.dtype == torch.int64
    assert (answer.indices[~mask] == -1).all()

    kept, indices = scores[mask].double(), answer.indices[mask]
    assert ((indices >= 0) & (indices < E)).all()
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "a row holds a column twice"
    chosen = kept.gather(-1, indices)
    assert (chosen > -torch.inf).all(), "a forbidden pair was chosen"
    assert (chosen.diff(dim=-1) <= 0).all(), "not by falling score"
    loads = torch.bincount(indices.flatten(), minlength=E)
    assert torch.equal(answer.loads, loads)
    assert int(loads.max()) <= capacity, f"load {int(loads.max())} above capacity {capacity}"

    size = float(chosen.abs().sum() + capacity * answer.prices.abs().sum()) + 1e-300
    assert answer.prices.shape == (E,)
    assert answer.prices.isfinite().all()
    if E * capacity > int(mask.sum()) * k:
        assert (answer.prices >= 0).all(), "a price below 0 where columns may stay short"
    objective, bound = float(answer.objective), float(answer.upper_bound)
    assert abs(objective - float(chosen.sum())) <= 1e-10 * size
    assert objective <= bound
    assert abs(bound - dual_value(kept, answer.prices, k, capacity)) <= 1e-9 * size
    assert float(answer.gap) == (bound - objective) / max(1.0, abs(bound))
    if answer.status == "optimal":
        assert bound - objective <= 1e-9 * size
        assert answer.reason == ""
    if optimal is not None:
        assert objective <= optimal + 1e-8 * size
        assert bound >= optimal - 1e-8 * size
        if answer.status == "optimal":
            assert abs(objective - optimal) <= 1e-8 * size


def entropic_plan(
    scores: Tensor, epsilon: float, row_mass: Tensor, col_mass: Tensor, *, max_iters: int = 20_000
) -> Tensor:
    """POT's log-domain Sinkhorn plan of ``max <P, S> + epsilon H(P)`` with these marginals, float64."""
    import ot

    plan = ot.sinkhorn(
        row_mass.double().numpy(),
        col_mass.double().numpy(),
        -scores.detach().double().numpy(),
        epsilon,
        method="sinkhorn_log",
        numItermax=max_iters,
        stopThr=1e-13,
        warn=False,
    )
    return torch.from_numpy(np.asarray(plan))
