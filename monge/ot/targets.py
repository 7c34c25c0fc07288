"""How many rows each column should be chosen by, and the margin step that moves prices to where it is so.

The order statistics that a step needs are taken over the rows of this process or over those of all ranks of a
group; the rest of a step is the same.

Shapes: T rows, E columns, k choices per row; ``...`` leading batch dimensions, one problem each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monge.ot.distributed import LOCAL, RowGroup, nth_largest


class Target(NamedTuple):
    """How many rows each column should be chosen by, in the form the order statistics below need.

    Attributes:
        rank: the largest n of all instances; a Python int, so that shapes and launches are fixed.
        clip: whether prices may not fall below 0, because columns may stay short; a (..., 1) bool tensor
            where instances differ.
        valid_T1: (..., T, 1) bool, or None when every row is valid.
        lift_T1: (..., T, 1) bool: in an instance with n < rank, rank - n of its invalid rows are put at +inf,
            so that its n-th largest is the rank-th of the column. None when n = rank in all.
        rows: the ranks among which the rows are spread. Where they are several, n is ``rank_1``, and the
            number of all rows ``total_1``, (..., 1) int64.
    """

    rank: int
    clip: bool | Tensor
    valid_T1: Tensor | None = None
    lift_T1: Tensor | None = None
    rows: RowGroup = LOCAL
    rank_1: Tensor | None = None
    total_1: Tensor | None = None

    @classmethod
    def of(
        cls, scores_TE: Tensor, k: int, capacity: int | None, mask: Tensor | None, rows: RowGroup = LOCAL
    ) -> Target:
        """Equal loads when ``capacity`` is None, otherwise at most ``capacity`` rows per column."""
        T, E = scores_TE.shape[-2:]
        if not rows.is_local:
            if mask is None:
                mask = scores_TE.new_ones(scores_TE.shape[:-1], dtype=torch.bool)
            total_1 = rows.sum(count_rows(mask))
            if capacity is None:
                return cls.spread(mask, total_1 * k // E, total_1, False, rows)
            return cls.spread(
                mask, torch.full_like(total_1, capacity), total_1, E * capacity > k * total_1, rows
            )
        if capacity is None:
            share = T * k // E
            return (
                cls(share, False)
                if mask is None
                else cls.masked(mask, share, k * count_rows(mask) // E, False)
            )
        if mask is None:
            return cls(capacity, E * capacity > T * k)
        return cls.masked(mask, capacity, None, E * capacity > k * count_rows(mask))

    @classmethod
    def masked(cls, mask_T: Tensor, rank: int, rank_1: Tensor | None, clip: bool | Tensor) -> Target:
        """A target over the rows of a mask, with ranks (..., 1) of at most ``rank``."""
        if rank_1 is None:
            return cls(rank, clip, mask_T.unsqueeze(-1))
        invalid = ~mask_T
        lift = invalid & (invalid.cumsum(-1) <= rank - rank_1)
        return cls(rank, clip, mask_T.unsqueeze(-1), lift.unsqueeze(-1))

    @classmethod
    def spread(
        cls, mask_T: Tensor, rank_1: Tensor, total_1: Tensor, clip: bool | Tensor, rows: RowGroup
    ) -> Target:
        """A target over the rows of all ranks."""
        return cls(0, clip, mask_T.unsqueeze(-1), None, rows, rank_1, total_1)

    def nothing_to_do(self, scores_TE: Tensor, k: int) -> bool:
        """Whether every row takes every column, or no column can be overloaded, as far as shapes tell."""
        T, E = scores_TE.shape[-2:]
        return k == E or (self.rows.is_local and self.rank >= T)

    def without_need(self, prices_E: Tensor) -> Tensor:
        """The prices, or zeros where no column can be overloaded, which with several ranks no shape tells."""
        if self.rank_1 is None or self.total_1 is None or self.clip is False:
            return prices_E
        return torch.where(self.rank_1 >= self.total_1, 0.0, prices_E)

    def threshold(self, values_TE: Tensor, *, midway: bool = False) -> Tensor:
        """(..., E), the (n+1)-th largest of every column, or the middle between it and the n-th."""
        if self.valid_T1 is not None:
            values_TE = torch.where(self.valid_T1, values_TE, -torch.inf)
        if self.rank_1 is not None:
            return nth_largest(values_TE, self.rank_1, self.rows, midway=midway)
        if self.lift_T1 is not None:
            values_TE = torch.where(self.lift_T1, torch.inf, values_TE)
        values_ET = values_TE.mT.contiguous()
        low = values_ET.kthvalue(values_ET.shape[-1] - self.rank, dim=-1).values
        if not midway:
            return low
        # The n-th is the smallest value above the (n+1)-th, unless the two are equal.
        above_ET = values_ET > low.unsqueeze(-1)
        high = torch.where(above_ET, values_ET, torch.inf).amin(-1)
        high = torch.where(above_ET.sum(-1) == self.rank, high, low)
        middle = torch.where(high.isfinite(), 0.5 * (low + high), low)
        return torch.where(low.isfinite(), middle, high)


def margin_step(
    scores_TE: Tensor, prices_E: Tensor, k: int, target: Target, damping: float = 0.9
) -> tuple[Tensor, Tensor]:
    """The prices after one margin step, and what the rows contributed to the dual value of those before it.

    That is the sum over rows of the k largest of ``scores - prices``, (...) float64.
    """
    adjusted_TE = scores_TE - prices_E.unsqueeze(-2)
    top = adjusted_TE.topk(k + 1, dim=-1, sorted=True).values
    # v1 is kept finite so that a forbidden pair never counts as chosen where a row has too few finite scores.
    v1, v2 = top[..., k - 1 : k].clamp(min=torch.finfo(top.dtype).min), top[..., k:]
    margins_TE = adjusted_TE - torch.where(adjusted_TE >= v1, v2, v1)
    step = target.threshold(margins_TE, midway=True)
    sums_T1 = top[..., :k].sum(-1, keepdim=True, dtype=torch.float64)
    if target.valid_T1 is not None:
        sums_T1 = torch.where(target.valid_T1, sums_T1, 0.0)
    # An infinite step: rows with no other choice overfill the column (+inf), or fewer than n can join it
    # (-inf).
    moved = prices_E + damping * torch.where(step.isfinite(), step, 0.0)
    centred = moved + (prices_E.mean(-1, keepdim=True) - moved.mean(-1, keepdim=True))
    if target.clip is False:
        return centred, sums_T1.sum((-2, -1))
    moved = torch.where(step == -torch.inf, 0.0, moved)
    # Where columns may stay short, a common positive part of all prices buys nothing.
    clipped = (moved - moved.amin(-1, keepdim=True).clamp(min=0.0)).clamp(min=0.0)
    if target.clip is not True:
        clipped = torch.where(target.clip, clipped, centred)
    return clipped, sums_T1.sum((-2, -1))


def count_rows(mask_T: Tensor) -> Tensor:
    """(..., 1), the rows that count."""
    return mask_T.sum(-1, keepdim=True)
