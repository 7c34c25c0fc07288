"""Hard, balanced partitions: every row to one column, sizes as equal as they can be.

Shapes: F rows, E columns.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from monge.ot.assignment import assign


def balanced_partition(affinity_FE: Tensor, *, method: str = "exact") -> Tensor:
    """Give each of F rows one of E labels, sizes differing by at most one, for the largest sum of affinities.

    ``max sum_f A[f, label_f]  subject to  floor(F/E) <= size_e <= ceil(F/E)``

    Exact in both cases. Where E divides F this is an assignment with capacity F/E. Otherwise the assignment
    with capacity ceil(F/E) is solved first, which may leave columns short of the floor; fewer than E shortest
    paths then bring them there, and each keeps the partition optimal for the floors reached so far
    (minimum-cost flow with lower bounds by successive shortest paths).

    Args:
        affinity_FE: (F, E), any float dtype; -inf forbids a pair.
        method: ``"exact"``, or ``"greedy"``: the largest affinities first, the usual rounding of a soft plan
            (arXiv 2606.01666, section 3), which loses some tenths of a percent.

    Returns:
        (F,) int64 labels on the device of the affinities; not differentiable.

    Raises:
        ValueError: not a floating-point (F, E) matrix with E >= 1, NaN or +inf, an unknown method, or
            forbidden pairs that leave no balanced partition.

    Examples:
        >>> import torch
        >>> from monge.ot import balanced_partition
        >>> affinity = torch.tensor([[5.0, 1.0], [4.0, 0.0], [3.0, 2.0], [9.0, 8.5], [1.0, -1.0]])
        >>> balanced_partition(affinity).tolist()
        [0, 0, 1, 1, 0]
    """
    if not isinstance(affinity_FE, Tensor):
        raise TypeError(f"affinity_FE must be a torch.Tensor, got {type(affinity_FE).__name__}")
    if affinity_FE.ndim != 2 or affinity_FE.shape[1] < 1 or not affinity_FE.is_floating_point():
        raise ValueError(
            "affinity_FE must be a floating-point matrix (F, E) with E >= 1, "
            f"got {affinity_FE.dtype} {tuple(affinity_FE.shape)}"
        )
    if method not in ("exact", "greedy"):
        raise ValueError(f"method must be exact or greedy, got {method!r}")
    F, E = affinity_FE.shape
    answer = assign(affinity_FE, 1, capacity=max(1, -(-F // E)), method=method)
    if answer.status == "infeasible":
        raise ValueError(f"affinity_FE {F} x {E} has no balanced partition: forbid (-inf) fewer pairs")
    labels_F = answer.indices[:, 0]
    floor = F // E
    if bool((answer.loads < floor).any()):
        labels = labels_F.cpu().numpy().copy()
        affinity = affinity_FE.detach().to("cpu", torch.float64).contiguous().numpy()
        if not raise_to_floor(affinity, labels, answer.prices.cpu().numpy().copy(), floor):
            raise ValueError(
                f"affinity_FE {F} x {E} has no partition with at least {floor} rows per column: "
                "forbid (-inf) fewer pairs"
            )
        labels_F = torch.from_numpy(labels).to(affinity_FE.device)
    return labels_F


@numba.njit(cache=True, nogil=True)
def raise_to_floor(affinity_FE, labels_F, prices_E, floor):  # type: ignore[no-untyped-def]
    """Move rows along shortest paths until no column has fewer than ``floor``; in place; False if impossible.

    Moving row r from column e to column f costs A_re - A_rf; cost_EE[e, f] is the least over the rows of e.
    Prices b with ``cost[e, f] - b_e + b_f >= 0`` (those of an optimal assignment) make all lengths of
    Dijkstra's method non-negative, and the distances renew them.
    """
    F, E = affinity_FE.shape
    sizes_E = np.zeros(E, np.int64)
    for r in range(F):
        sizes_E[labels_F[r]] += 1
    cost_EE, row_EE = np.empty((E, E)), np.empty((E, E), np.int64)
    distance_E, before_E = np.empty(E), np.empty(E, np.int64)
    while sizes_E.min() < floor:
        cost_EE[:] = np.inf
        for r in range(F):
            e = labels_F[r]
            for f in range(E):
                if affinity_FE[r, e] - affinity_FE[r, f] < cost_EE[e, f]:
                    cost_EE[e, f] = affinity_FE[r, e] - affinity_FE[r, f]
                    row_EE[e, f] = r
        # A column above the floor may give a row away: a source, whose price is the length of its way in.
        settled_E = np.zeros(E, np.bool_)
        for e in range(E):
            distance_E[e] = max(0.0, prices_E[e]) if sizes_E[e] > floor else np.inf
            before_E[e] = -1
        farthest = 0.0
        for _ in range(E):
            e = -1
            for f in range(E):
                if not settled_E[f] and (e < 0 or distance_E[f] < distance_E[e]):
                    e = f
            if distance_E[e] == np.inf:
                break
            settled_E[e] = True
            farthest = distance_E[e]
            for f in range(E):
                length = max(0.0, cost_EE[e, f] - prices_E[e] + prices_E[f])
                if not settled_E[f] and distance_E[e] + length < distance_E[f]:
                    distance_E[f] = distance_E[e] + length
                    before_E[f] = e
        target = -1
        for e in range(E):
            prices_E[e] -= min(distance_E[e], farthest)
            if sizes_E[e] < floor and settled_E[e] and (target < 0 or prices_E[e] > prices_E[target]):
                target = e
        if target < 0:
            return False
        e = target
        while before_E[e] >= 0:
            labels_F[row_EE[before_E[e], e]] = e
            e = before_E[e]
        sizes_E[e] -= 1
        sizes_E[target] += 1
    return True
