"""Price steps: the E-sized vector b for which the k largest of ``s_t - b`` load all columns alike.

The assignment problem (maximise ``sum x_te s_te``, k choices per row, at most C rows per column) has the dual
``min_b sum_t (sum of the k largest of s_t - b) + C * sum_e b_e``. b_e is the price of column e, and an
optimal assignment is the top-k of ``s - b`` in every row, up to ties. A price step improves b from one batch
of scores. Where b is carried over from batch to batch, the choice of a row depends on no other row: it is
causal.

Which one to choose: ``margin_prices`` is the most exact step, and the one the exact solver starts with;
``quantile_prices`` is the published quantile balancing; ``sign_prices`` needs the loads alone, and moves
slowly. All are pure functions of tensors with fixed shapes: any device, no host synchronisation,
``torch.compile``. A margin or quantile step costs a ``topk`` over columns and a ``kthvalue`` over rows.

Shapes: T rows, E columns, k choices per row; ``...`` leading batch dimensions, one problem each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


@torch.no_grad()
def margin_prices(
    scores_TE: Tensor,
    k: int,
    *,
    capacity: int | None = None,
    prices: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 1,
    damping: float = 0.9,
) -> Tensor:
    """Prices (..., E) after margin steps: each moves every b_e to where column e alone would be balanced.

    Let a = s - b, and v1, v2 the k-th and (k+1)-th largest of a row of a. The margin

        ``m_te = a_te - (v2 if a_te >= v1 else v1)``

    is how far b_e must rise until row t no longer chooses e, or, negative, fall until it does, all else
    fixed. The step is ``b_e += damping * d_e``, with d_e midway between the n-th and the (n+1)-th largest
    margin of the column: n rows would then choose it. ``quantile_prices`` has v2 in the place of v1 too,
    which is right for the rows that choose e and wrong for those that would have to begin.

    Args:
        scores_TE: (..., T, E) scores, any float dtype; computed in at least float32. -inf forbids a pair.
        k: choices per row, 1 <= k <= E.
        capacity: None: equal loads, n = floor(T k / E); only differences of prices matter, and the mean of b
            stays what it was. An integer: n = capacity, and where that leaves slack (E * capacity > T k)
            prices are clipped at 0.
        prices: (E,) or (..., E) to start from; zeros by default.
        mask: (..., T) bool, True marks valid rows; T counts those alone.
        steps: how often to repeat on the same scores.
        damping: share of the step that is taken; all columns move at once, hence below 1.

    Raises:
        ValueError: k outside 1..E, a negative capacity, or shapes that do not fit. Values are not looked at.

    Source: this library; the quantile step it refines is kexue.fm/archives/11619.

    Examples:
        >>> import torch
        >>> from monge.ot import margin_prices
        >>> scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> scores[:, 0] += 2.0
        >>> prices = margin_prices(scores, k=1, steps=8)
        >>> scores.argmax(-1).bincount().tolist(), (scores - prices).argmax(-1).bincount().tolist()
        ([52, 4, 5, 3], [16, 16, 16, 16])
    """
    scores, b = _checked(scores_TE, k, capacity, prices, mask)
    T, E = scores.shape[-2:]
    target = Target.of(scores, k, capacity, mask)
    if k == E or target.rank >= T:  # every row takes every column, or no column can be overloaded
        return b if capacity is None else torch.zeros_like(b)
    for _ in range(steps):
        b, _ = margin_step(scores, b, k, target, damping)
    return b


@torch.no_grad()
def quantile_prices(
    scores_TE: Tensor,
    k: int,
    *,
    capacity: int | None = None,
    prices: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 1,
) -> Tensor:
    """Prices (..., E) after ``steps`` steps of quantile balancing.

    ``a_t = (k+1)-th largest of s_t - b``, then ``b_e = (n+1)-th largest of s_te - a_t``: alternating
    minimisation of the dual in the row prices a and the column prices b. Arguments and errors as
    ``margin_prices``. With capacity None, n = floor(T k / E) and b has any sign (the equality form); with an
    int, n = capacity and b is clipped at 0.

    Source: kexue.fm/archives/11619.

    Examples:
        >>> import torch
        >>> from monge.ot import quantile_prices
        >>> scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> scores[:, 0] += 2.0
        >>> (scores - quantile_prices(scores, k=1, steps=8)).argmax(-1).bincount().tolist()
        [17, 15, 16, 16]
    """
    scores, b = _checked(scores_TE, k, capacity, prices, mask)
    T, E = scores.shape[-2:]
    target = Target.of(scores, k, capacity, mask)
    if k == E or target.rank >= T:  # every row takes every column, or no column can be overloaded
        return b if capacity is None else torch.zeros_like(b)
    for _ in range(steps):
        a_T1 = (scores - b.unsqueeze(-2)).topk(k + 1, dim=-1, sorted=True).values[..., k:]
        level = target.threshold(scores - a_T1)
        if capacity is not None:
            level = level.clamp(min=0.0)
        b = torch.where(level.isfinite(), level, b)
    return b


@torch.no_grad()
def sign_prices(prices: Tensor, loads: Tensor, rate: float = 1e-3) -> Tensor:
    """``b_e + rate * sign(load_e - mean load)``: the loss-free balancing of DeepSeek-V3, whose bias is -b.

    The sign of the dual's subgradient with a constant step: a price changes by ``rate`` per call, whatever
    the scale of the scores, so ``rate`` sets both the speed and the final jitter.

    Args:
        prices: (..., E).
        loads: (..., E) rows per column in the last batch, any number type.
        rate: the step, in units of the scores.

    Source: arXiv 2408.15664, algorithm 1.

    Examples:
        >>> import torch
        >>> from monge.ot import sign_prices
        >>> sign_prices(torch.zeros(3), torch.tensor([6, 3, 0]), rate=0.5)
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    if prices.shape != loads.shape:
        raise ValueError(f"prices {tuple(prices.shape)} and loads {tuple(loads.shape)} must have one shape")
    loads = loads.to(prices.dtype)
    return prices + rate * torch.sign(loads - loads.mean(-1, keepdim=True))


class Target(NamedTuple):
    """How many rows each column should be chosen by, in the form the order statistics below need.

    Attributes:
        rank: the largest n of all instances; a Python int, so that shapes and launches are fixed.
        clip: whether prices may not fall below 0, because columns may stay short; a (..., 1) bool tensor
            where instances differ.
        valid_T1: (..., T, 1) bool, or None when every row is valid.
        lift_T1: (..., T, 1) bool: in an instance with n < rank, rank - n of its invalid rows are put at +inf,
            so that its n-th largest is the rank-th of the column. None when n = rank in all.
    """

    rank: int
    clip: bool | Tensor
    valid_T1: Tensor | None = None
    lift_T1: Tensor | None = None

    @classmethod
    def of(cls, scores_TE: Tensor, k: int, capacity: int | None, mask: Tensor | None) -> Target:
        """Equal loads when ``capacity`` is None, otherwise at most ``capacity`` rows per column."""
        T, E = scores_TE.shape[-2:]
        if capacity is None:
            share = T * k // E
            return (
                cls(share, False) if mask is None else cls.masked(mask, share, k * _count(mask) // E, False)
            )
        if mask is None:
            return cls(capacity, E * capacity > T * k)
        return cls.masked(mask, capacity, None, E * capacity > k * _count(mask))

    @classmethod
    def masked(cls, mask_T: Tensor, rank: int, rank_1: Tensor | None, clip: bool | Tensor) -> Target:
        """A target over the rows of a mask, with ranks (..., 1) of at most ``rank``."""
        if rank_1 is None:
            return cls(rank, clip, mask_T.unsqueeze(-1))
        invalid = ~mask_T
        lift = invalid & (invalid.cumsum(-1) <= rank - rank_1)
        return cls(rank, clip, mask_T.unsqueeze(-1), lift.unsqueeze(-1))

    def threshold(self, values_TE: Tensor, *, midway: bool = False) -> Tensor:
        """(..., E), the (n+1)-th largest of every column, or the middle between it and the n-th."""
        if self.valid_T1 is not None:
            values_TE = torch.where(self.valid_T1, values_TE, -torch.inf)
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


def _count(mask_T: Tensor) -> Tensor:
    return mask_T.sum(-1, keepdim=True)


def _checked(
    scores: Tensor, k: int, capacity: int | None, prices: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and starting prices in the computing type. Shapes are checked; looking at values would sync."""
    if scores.ndim < 2 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be a floating-point tensor (..., T, E), got {scores.dtype} {tuple(scores.shape)}"
        )
    E = scores.shape[-1]
    if not 1 <= k <= E:
        raise ValueError(f"k must lie in 1..E = {E}, got {k}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be None or a non-negative integer, got {capacity}")
    shape_E = (*scores.shape[:-2], E)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if prices is None:
        prices = scores.new_zeros(shape_E)
    elif prices.shape[-1:] != (E,) or prices.ndim > scores.ndim - 1:
        raise ValueError(f"prices must be (E,) or (..., E) = {shape_E}, got {tuple(prices.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != scores.shape[:-1]):
        raise ValueError(
            f"mask must be bool {tuple(scores.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    return scores, prices.to(scores.dtype).expand(shape_E)
