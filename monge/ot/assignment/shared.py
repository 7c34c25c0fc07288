"""The approximate method over the rows of several ranks: shared prices, quotas, a local assignment to them.

1. Prices: margin steps on the rows of all ranks, exact order statistics by counting (`monge.ot.distributed`).
2. Every rank tells how many of its rows want each column at these prices, E + 1 numbers. From these demands
   all ranks compute the same quotas: rank r may use q_re places of column e. Quotas respect the capacity of
   every column in total and leave every rank the places that its rows need.
3. Every rank assigns its rows under its quotas, by the proposals and the completion of the local method.

So loads in total never exceed the capacity and nothing is dropped: k places of distinct columns can be
found for T_r rows wherever ``q_re <= T_r`` and ``sum_e q_re >= k T_r``, because ``sum_e min(q_re, j)`` is
concave in j and therefore at least k j for every j <= T_r (Gale, 1957). All scores must be finite: a
forbidden pair could make a quota unusable.

Shapes: B instances, T rows, E columns, k choices per row, R ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monge.ot.assignment.approximate import STEPS_ON_ALL, STEPS_TO_EQUAL, conditioned, levelled, propose
from monge.ot.assignment.completion import complete_assignment
from monge.ot.distributed import RowGroup
from monge.ot.targets import Target, margin_step


def solve_shared(
    scores_BTE: Tensor, mask_BT: Tensor, k: int, capacity_B: Tensor, total_B: Tensor, rows: RowGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's indices (B, T, k) in no order, prices (B, E) of all ranks, and (B,) whether complete.

    Args:
        scores_BTE: float32 or float64, finite where valid; this rank's rows.
        capacity_B: (B,) int64, at most ``total_B``, the valid rows of all ranks.
    """
    B, T, E = scores_BTE.shape
    enough_B = E * capacity_B >= k * total_B
    if k == E:  # every row takes every column
        slots_BTk = torch.arange(E, device=scores_BTE.device).repeat(B, T, 1)
        return slots_BTk, scores_BTE.new_zeros(B, E, dtype=torch.float64), enough_B
    work_BTE, scale_B1 = conditioned(scores_BTE, mask_BT, rows)
    prices_BE = shared_prices(work_BTE, mask_BT, k, capacity_B.unsqueeze(-1), total_B.unsqueeze(-1), rows)
    wanted_BTk = (work_BTE - prices_BE.unsqueeze(-2)).topk(k, dim=-1).indices
    wanted_BTk = torch.where(mask_BT.unsqueeze(-1), wanted_BTk, E).flatten(1)
    demand_BE = torch.zeros(B, E + 1, dtype=torch.int64, device=scores_BTE.device)
    demand_BE = demand_BE.scatter_add(-1, wanted_BTk, torch.ones_like(wanted_BTk))[:, :E]
    told_RBX = rows.gather(torch.cat([demand_BE, mask_BT.sum(-1, keepdim=True)], -1)).cpu().numpy()
    quota_BE = np.zeros((B, E), np.int64)
    for b, (capacity, enough) in enumerate(zip(capacity_B.tolist(), enough_B.tolist())):
        if enough:
            quota_BE[b] = quotas(told_RBX[:, b, :E], told_RBX[:, b, E], k, capacity)[rows.rank]
    limit_BE = torch.from_numpy(quota_BE).to(scores_BTE.device)
    slots_BTk = propose(work_BTE, mask_BT, prices_BE, k, limit_BE)
    slots_BTk, _ = complete_assignment(scores_BTE, slots_BTk, mask_BT, limit_BE)
    return slots_BTk, prices_BE * scale_B1, enough_B


def shared_prices(
    scores_BTE: Tensor, mask_BT: Tensor, k: int, capacity_B1: Tensor, total_B1: Tensor, rows: RowGroup
) -> Tensor:
    """Prices (B, E) of least dual value among the last margin steps, as in the local method, on all rows."""
    B, _, E = scores_BTE.shape
    prices_BE = scores_BTE.new_zeros(B, E)
    slack_B1 = E * capacity_B1 > k * total_B1
    equal = Target.spread(mask_BT, total_B1 * k // E, total_B1, False, rows)
    for _ in range(STEPS_TO_EQUAL):
        prices_BE, _ = margin_step(scores_BTE, prices_BE, k, equal)
    low_B1, high_B1 = prices_BE.aminmax(dim=-1, keepdim=True)
    level_BE = levelled(scores_BTE, mask_BT, prices_BE, k, capacity_B1, low_B1, high_B1, 10, rows)
    prices_BE = torch.where(slack_B1, level_BE, prices_BE)
    target = Target.spread(mask_BT, capacity_B1, total_B1, slack_B1, rows)
    best_BE, least_B1 = prices_BE, torch.full_like(capacity_B1, torch.inf, dtype=torch.float64)
    for step in range(STEPS_ON_ALL + 1):
        moved_BE, sums_B = margin_step(scores_BTE, prices_BE, k, target)
        asked_B1 = prices_BE.sum(-1, keepdim=True, dtype=torch.float64)
        dual_B1 = rows.sum(sums_B.unsqueeze(-1)) + capacity_B1 * asked_B1
        best_BE = torch.where(dual_B1 < least_B1, prices_BE, best_BE)
        least_B1 = torch.minimum(dual_B1, least_B1)
        if step == STEPS_ON_ALL // 2:
            reach_B1 = 4 * (moved_BE - prices_BE).abs().amax(-1, keepdim=True)
            positive_BE = torch.where(moved_BE > 0, moved_BE, -torch.inf)  # the others stay at 0
            level_BE = levelled(
                scores_BTE, mask_BT, positive_BE, k, capacity_B1, -reach_B1, reach_B1, 5, rows
            )
            moved_BE = torch.where(slack_B1, level_BE, moved_BE)
        prices_BE = moved_BE
    return torch.where(capacity_B1 >= total_B1, 0.0, best_BE)


def quotas(demand_RE: np.ndarray, rows_R: np.ndarray, k: int, capacity: int) -> np.ndarray:
    """(R, E) places: columns sum to at most ``capacity``, row r to ``k rows_r``, no entry above ``rows_r``.

    Close to the demands, whose rows sum to ``k rows_r``. In integers and in a fixed order, so that all ranks
    find the same. Needs ``E capacity >= k sum(rows)`` and ``capacity <= sum(rows)``.

    Examples:
        >>> quotas(np.array([[4, 0], [3, 1]]), np.array([4, 4]), 1, 4).tolist()
        [[2, 2], [2, 2]]
    """
    demand_RE = demand_RE.astype(np.int64)
    # What exceeds the capacity is cut from the ranks in proportion to their demand.
    before_RE = np.cumsum(demand_RE, 0)
    total_E = np.maximum(before_RE[-1], 1)
    kept_RE = before_RE * np.minimum(total_E, capacity) // total_E
    quota_RE = np.diff(kept_RE, axis=0, prepend=0)
    short_R, room_E = k * rows_R - quota_RE.sum(1), capacity - quota_RE.sum(0)
    for r in np.flatnonzero(short_R):
        most_E = np.minimum(room_E, rows_R[r] - quota_RE[r])
        # Spread over the columns with room, in proportion to it.
        until_E, given = np.cumsum(most_E), min(int(short_R[r]), int(most_E.sum()))
        given_E = np.diff(until_E * given // max(int(until_E[-1]), 1), prepend=0)
        quota_RE[r] += given_E
        room_E -= given_E
        short_R[r] -= given
    for r in np.flatnonzero(short_R):
        while short_R[r] > 0:
            _exchange(quota_RE, rows_R, room_E, short_R, int(r))
    return quota_RE


def _exchange(
    quota_RE: np.ndarray, rows_R: np.ndarray, room_E: np.ndarray, short_R: np.ndarray, r: int
) -> None:
    """Give rank r places on a full column e, from which another rank moves to a column f with room.

    Rank r has as many places as rows on every column with room already. There is such a rank: of e the others
    hold more places than of f, for r holds fewer, and e is full while f is not.
    """
    f = int(room_E.argmax())
    open_E = quota_RE[r] < rows_R[r]
    movable_RE = np.minimum(quota_RE, (rows_R - quota_RE[:, f])[:, None]) * open_E
    movable_RE[r] = 0
    other, e = np.unravel_index(int(movable_RE.argmax()), movable_RE.shape)
    moved = min(int(movable_RE[other, e]), int(room_E[f]), int(short_R[r]), int(rows_R[r] - quota_RE[r, e]))
    quota_RE[other, e] -= moved
    quota_RE[other, f] += moved
    quota_RE[r, e] += moved
    room_E[f] -= moved
    short_R[r] -= moved
