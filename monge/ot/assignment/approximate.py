"""The approximate method: price steps, then rounds of proposals, in vectorised torch on any device.

1. Prices: margin steps on a strided sample of the rows, then on all; the b of least dual value is kept.
2. Every row proposes to its top-k of ``s - b``; a column with too many proposals keeps those of largest
   margin.
3. Rounds: each row short of a slot proposes to its best column with room, and columns keep the proposals that
   would lose most elsewhere.
4. ``complete_assignment`` fills what is left, usually nothing or a few slots, by augmenting paths.

Every number of steps is fixed. No column ever exceeds its capacity, since a proposal is accepted only if its
rank in the column is below the room left; nothing is dropped, since step 4 succeeds wherever a complete
assignment exists (``completion.py`` has the proof). The gap is certified by the prices and the given scores
in float64.

Shapes: B instances, T rows, E columns, k choices per row, N = T or T k proposals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monge.ot.assignment.completion import complete_assignment
from monge.ot.distributed import LOCAL, RowGroup
from monge.ot.targets import Target, margin_step

STRIDE = 8
SAMPLE_FROM = 2048
STEPS_TO_EQUAL, STEPS_ON_SAMPLE, STEPS_ON_ALL = 6, 2, 8
ROUNDS = 8


def solve_approximate(
    scores_BTE: Tensor, mask_BT: Tensor, k: int, capacity_B: Tensor, most: int, slack: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B, T, k) in no order, float64 prices (B, E), and (B,) whether a complete assignment exists.

    Args:
        scores_BTE: float32 or float64; masked rows may hold anything.
        capacity_B: (B,) int64, at most ``most`` and at most the valid rows of the instance.
        most: the largest capacity, a Python int, so that shapes and launches are fixed.
        slack: whether columns may stay below their capacity in some instance.
    """
    B, T, E = scores_BTE.shape
    if k == E or most == 0:  # every row takes every column, or there are no rows
        slots_BTk = torch.arange(E, device=scores_BTE.device)[:k].repeat(B, T, 1)
        return slots_BTk, scores_BTE.new_zeros(B, E, dtype=torch.float64), capacity_B >= 0
    work_BTE, scale_B1 = conditioned(scores_BTE, mask_BT)
    prices_BE = descend(work_BTE, mask_BT, k, capacity_B, most, slack)
    slots_BTk = propose(work_BTE, mask_BT, prices_BE, k, capacity_B)
    slots_BTk, complete_B = complete_assignment(scores_BTE, slots_BTk, mask_BT, capacity_B)
    return slots_BTk, prices_BE * scale_B1, complete_B


def conditioned(scores_BTE: Tensor, mask_BT: Tensor, rows: RowGroup = LOCAL) -> tuple[Tensor, Tensor]:
    """float32 scores to work with, and the scale (B, 1) float64 that prices must be multiplied by.

    Rows are centred, which changes no assignment, and divided by the mean deviation, which keeps any finite
    scores in range. Ties are broken by a hash scaled to 2^-20: rows that are equal, or were rounded to
    bfloat16, would otherwise all propose to the same columns.
    """
    T, E = scores_BTE.shape[-2:]
    finite_BTE = scores_BTE.isfinite() & mask_BT.unsqueeze(-1)
    count_BT1 = finite_BTE.sum(-1, keepdim=True).clamp(min=1)
    clean_BTE = torch.where(finite_BTE, scores_BTE, 0.0).to(torch.float64)
    centred_BTE = torch.where(finite_BTE, clean_BTE - (clean_BTE / count_BT1).sum(-1, keepdim=True), 0.0)
    total_B11 = rows.sum(count_BT1.sum((-2, -1), keepdim=True)).clamp(min=1)
    scale_B11 = rows.sum((centred_BTE.abs() / total_B11).sum((-2, -1), keepdim=True))
    scale_B11 = torch.where(scale_B11 > 0, scale_B11, 1.0)
    work_BTE = torch.where(
        finite_BTE,
        centred_BTE / scale_B11 + 2.0**-20 * tie_break(T, E, scores_BTE.device, rows.rank),
        -torch.inf,
    )
    return work_BTE.to(torch.float32), scale_B11.squeeze(-1)


def tie_break(T: int, E: int, device: torch.device, rank: int = 0) -> Tensor:
    """(T, E) float64 in [0, 1): a multiplicative hash of rank and position, the same on every device."""
    first = 1 + (rank << 24)
    x = torch.arange(first, first + T * E, device=device) * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x85EBCA6B & 0xFFFFFFFF
    return ((x ^ x >> 13) * 2.0**-32).view(T, E)


def descend(
    scores_BTE: Tensor, mask_BT: Tensor, k: int, capacity_B: Tensor, most: int, slack: bool
) -> Tensor:
    """Prices (B, E) of least dual value among the last margin steps; the first ones use a sample of the rows.

    Margin steps settle the differences between columns fast and the common level of all prices slowly. Slack
    pins that level: a column with a positive price must be full. There the first steps ask for equal loads, a
    bisection of the level (``levelled``) follows, and a short one again after some steps on all rows.
    """
    B, T, E = scores_BTE.shape
    prices_BE = scores_BTE.new_zeros(B, E)
    if most >= T:
        return prices_BE
    stride = STRIDE if T >= SAMPLE_FROM else 1
    some_BTE, some_BT = scores_BTE[:, ::stride], mask_BT[:, ::stride]
    few, some_B1, capacity_B1 = some_BT.shape[-1], some_BT.sum(-1, keepdim=True), capacity_B.unsqueeze(-1)
    share_B1 = (-(-capacity_B1 // stride)).clamp(max=few - 1)
    slack_B1 = E * capacity_B1 > k * mask_BT.sum(-1, keepdim=True)

    equal = Target.masked(some_BT, few * k // E, some_B1 * k // E, False)
    for _ in range(STEPS_TO_EQUAL):
        prices_BE, _ = margin_step(some_BTE, prices_BE, k, equal)
    if slack:
        low_B1, high_B1 = prices_BE.aminmax(dim=-1, keepdim=True)
        level_BE = levelled(some_BTE, some_BT, prices_BE, k, share_B1, low_B1, high_B1, 10)
        prices_BE = torch.where(slack_B1, level_BE, prices_BE)
    target = Target.masked(some_BT, min(few - 1, -(-most // stride)), share_B1, slack_B1)
    for _ in range(STEPS_ON_SAMPLE if stride > 1 else 0):
        prices_BE, _ = margin_step(some_BTE, prices_BE, k, target)

    target = Target.masked(mask_BT, most, capacity_B1, slack_B1)
    best_BE, least_B = prices_BE, torch.full_like(capacity_B, torch.inf, dtype=torch.float64)
    for step in range(STEPS_ON_ALL + 1):
        moved_BE, sums_B = margin_step(scores_BTE, prices_BE, k, target)
        dual_B = sums_B + capacity_B * prices_BE.sum(-1, dtype=torch.float64)
        better_B = dual_B < least_B
        best_BE = torch.where(better_B.unsqueeze(-1), prices_BE, best_BE)
        least_B = torch.where(better_B, dual_B, least_B)
        if slack and step == STEPS_ON_ALL // 2:
            reach_B1 = 4 * (moved_BE - prices_BE).abs().amax(-1, keepdim=True)
            positive_BE = torch.where(moved_BE > 0, moved_BE, -torch.inf)  # the others stay at 0
            level_BE = levelled(scores_BTE, mask_BT, positive_BE, k, capacity_B1, -reach_B1, reach_B1, 5)
            moved_BE = torch.where(slack_B1, level_BE, moved_BE)
        prices_BE = moved_BE
    return best_BE


def levelled(
    scores_BTE: Tensor,
    mask_BT: Tensor,
    prices_BE: Tensor,
    k: int,
    capacity_B1: Tensor,
    low_B1: Tensor,
    high_B1: Tensor,
    halvings: int,
    rows: RowGroup = LOCAL,
) -> Tensor:
    """``max(0, b - D)`` with D in [low, high] such that the columns of positive price are full in total."""
    for _ in range(halvings):
        middle_B1 = 0.5 * (low_B1 + high_B1)
        b_BE = (prices_BE - middle_B1).clamp(min=0.0)
        adjusted_BTE = scores_BTE - b_BE.unsqueeze(-2)
        kth_BT1 = adjusted_BTE.topk(k, dim=-1).values[..., -1:]
        loads_BE = rows.sum(((adjusted_BTE >= kth_BT1) & mask_BT.unsqueeze(-1)).sum(-2))
        surplus_B1 = torch.where(b_BE > 0, loads_BE - capacity_B1, 0).sum(-1, keepdim=True)
        low_B1 = torch.where(surplus_B1 < 0, middle_B1, low_B1)
        high_B1 = torch.where(surplus_B1 < 0, high_B1, middle_B1)
    return (prices_BE - 0.5 * (low_B1 + high_B1)).clamp(min=0.0)


def propose(scores_BTE: Tensor, mask_BT: Tensor, prices_BE: Tensor, k: int, capacity_B: Tensor) -> Tensor:
    """(B, T, k) slots in no order, -1 where a row found no column with room; no column above its capacity.

    Capacities are (B,), or (B, E) where columns differ.
    """
    B, T, E = scores_BTE.shape
    adjusted_BTE = scores_BTE - prices_BE.unsqueeze(-2)
    top = adjusted_BTE.topk(k + 1, dim=-1)
    margins_BTk = top.values[..., :k] - top.values[..., k:]
    chosen_BTk = torch.where(
        mask_BT.unsqueeze(-1) & (top.values[..., :k] > -torch.inf), top.indices[..., :k], E
    )
    room_BE = (capacity_B if capacity_B.ndim == 2 else capacity_B.unsqueeze(-1)).expand(B, E)
    kept_BN, room_BE = accept(chosen_BTk.flatten(1), margins_BTk.flatten(1), room_BE)
    slots_BTk = torch.where(kept_BN.view(B, T, k), chosen_BTk, -1)
    # A column that a row has, or lost in the competition for it, is no longer open to that row.
    closed_BTE = scores_BTE == -torch.inf
    closed_BTE = torch.cat((closed_BTE, closed_BTE[..., :1]), -1).scatter(-1, chosen_BTk, True)[..., :E]
    for _ in range(ROUNDS):
        missing_BTk = (slots_BTk < 0) & mask_BT.unsqueeze(-1)
        if (
            not torch.compiler.is_compiling()
            and missing_BTk.device.type == "cpu"
            and not bool(missing_BTk.any())
        ):
            break
        open_BTE = ~closed_BTE & (room_BE > 0).unsqueeze(-2) & missing_BTk.any(-1, keepdim=True)
        best = torch.where(open_BTE, adjusted_BTE, -torch.inf).topk(2, dim=-1)
        proposal_BT = torch.where(best.values[..., 0] > -torch.inf, best.indices[..., 0], E)
        accepted_BT, room_BE = accept(proposal_BT, best.values[..., 0] - best.values[..., 1], room_BE)
        first_BTk = missing_BTk & (missing_BTk.cumsum(-1) == 1)
        slots_BTk = torch.where(first_BTk & accepted_BT.unsqueeze(-1), proposal_BT.unsqueeze(-1), slots_BTk)
        taken_BTE = torch.arange(E, device=proposal_BT.device) == proposal_BT.unsqueeze(-1)
        closed_BTE = closed_BTE | (taken_BTE & accepted_BT.unsqueeze(-1))
    return slots_BTk


def accept(columns_BN: Tensor, priority_BN: Tensor, room_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Which proposals are among the ``room`` of highest priority in their column, and the room left.

    Column E stands for no proposal. Two stable sorts order the proposals by column and, inside one, by
    priority; a proposal is accepted if its rank there is below the room. Equal priorities go to the earlier
    proposal.
    """
    B, N = columns_BN.shape
    E = room_BE.shape[-1]
    room_BE = torch.cat((room_BE, room_BE.new_zeros(B, 1)), -1)
    order_BN = priority_BN.argsort(dim=-1, descending=True, stable=True)
    sorted_BN, by_column_BN = columns_BN.gather(-1, order_BN).sort(dim=-1, stable=True)
    order_BN = order_BN.gather(-1, by_column_BN)
    counts_BE = room_BE.new_zeros(B, E + 1).scatter_add_(-1, columns_BN, torch.ones_like(columns_BN))
    start_BE = counts_BE.cumsum(-1) - counts_BE
    rank_BN = torch.arange(N, device=columns_BN.device) - start_BE.gather(-1, sorted_BN)
    accepted_BN = rank_BN < room_BE.gather(-1, sorted_BN)
    accepted_BN = torch.zeros_like(accepted_BN).scatter(-1, order_BN, accepted_BN)
    return accepted_BN, (room_BE - torch.minimum(counts_BE, room_BE))[..., :E]
