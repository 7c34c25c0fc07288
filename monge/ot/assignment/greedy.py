"""The greedy method: the best pairs first while there is room, then completion, so that nothing is dropped.

Shapes: T rows, E columns, k choices per row.

Entries are taken in descending order, ties in row-major order, unless their row is full or their column is:
the rounding used with soft plans (arXiv 2606.01666, section 3) and by many capacity-limited routers. What the
order left incomplete is filled by augmenting paths (``completion.py``). The bound comes from price steps.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from monge.ot.assignment.approximate import conditioned, descend
from monge.ot.assignment.certificate import certified
from monge.ot.assignment.completion import complete
from monge.ot.assignment.solution import Solution


def solve_greedy(scores_TE: np.ndarray, k: int, capacity: int, max_work: int | None = None) -> Solution:
    """Greedy assignment of (T, E) scores; ``max_work`` belongs to the common signature and bounds nothing."""
    T, E = scores_TE.shape
    slots_Tk = np.full((T, k), -1, dtype=np.int64)
    loads_E = np.zeros(E, dtype=np.int64)
    scores_64 = scores_TE.astype(np.float64)
    order = np.argsort(-scores_TE, axis=None, kind="stable")
    take_in_order(scores_64, order, slots_Tk, loads_E, capacity)
    if not complete(scores_64, slots_Tk, loads_E, capacity):
        return Solution.infeasible(T, E, k, "pairs", "greedy")
    scores, mask = torch.from_numpy(scores_TE)[None], torch.ones(1, T, dtype=torch.bool)
    capacity_1 = torch.tensor([capacity])
    prices_1E = torch.zeros(1, E, dtype=torch.float64)
    if k < E:
        work, scale = conditioned(scores, mask)
        prices_1E = scale * descend(work, mask, k, capacity_1, capacity, E * capacity > T * k)
    indices, objective, bound, optimal = certified(
        scores, mask, torch.from_numpy(slots_Tk)[None], prices_1E, capacity_1
    )
    return Solution(
        indices=indices[0].numpy(),
        prices=prices_1E[0].numpy(),
        loads=loads_E,
        objective=float(objective),
        upper_bound=float(bound),
        status="optimal" if bool(optimal) else "approximate",
        stage="greedy",
        reason="" if bool(optimal) else "steps",
    )


@numba.njit(cache=True, nogil=True)
def take_in_order(scores_TE, order, slots_Tk, loads_E, capacity):  # type: ignore[no-untyped-def]
    """Fill ``slots_Tk`` and ``loads_E`` in place with those pairs of ``order`` (flat) that find room."""
    T, E = scores_TE.shape
    k = slots_Tk.shape[1]
    held_T = np.zeros(T, np.int64)
    left = T * k
    for flat in order:
        t, e = flat // E, flat % E
        if held_T[t] < k and loads_E[e] < capacity and scores_TE[t, e] > -np.inf:
            slots_Tk[t, held_T[t]] = e
            held_T[t] += 1
            loads_E[e] += 1
            left -= 1
            if left == 0:
                return
