"""Price steps: the E-sized vector b for which the k largest of ``s_t - b`` load all columns alike.

The assignment problem (maximise ``sum x_te s_te``, k choices per row, at most C rows per column) has the dual
``min_b sum_t (sum of the k largest of s_t - b) + C * sum_e b_e``. b_e is the price of column e, and an
optimal assignment is the top-k of ``s - b`` in every row, up to ties. A price step improves b from one batch
of scores. Where b is carried over from batch to batch, the choice of a row depends on no other row: it is
causal.

Which one to choose: ``margin_prices`` is the most exact step, and the one the exact solver starts with;
``quantile_prices`` is the published quantile balancing; ``sign_prices`` needs the loads alone, and moves
slowly. All are pure functions of tensors with fixed shapes: any device, no host synchronisation,
``torch.compile`` (without ``group``). A margin or quantile step costs a ``topk`` over columns and a
``kthvalue`` over rows.

Shapes: T rows, E columns, k choices per row; ``...`` leading batch dimensions, one problem each.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from monge.ot.distributed import RowGroup
from monge.ot.targets import Target, margin_step


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
    group: dist.ProcessGroup | None = None,
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
        group: a process group over whose ranks the rows are spread, any number to each; T counts them all,
            and every rank returns the prices of one process with all rows. All ranks must call together. A
            step is 8 messages of 15 E counts (16 for float64) and two of E numbers.

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
    target = Target.of(scores, k, capacity, mask, RowGroup(group))
    if target.nothing_to_do(scores, k):
        return b if capacity is None else torch.zeros_like(b)
    for _ in range(steps):
        b, _ = margin_step(scores, b, k, target, damping)
    return target.without_need(b)


@torch.no_grad()
def quantile_prices(
    scores_TE: Tensor,
    k: int,
    *,
    capacity: int | None = None,
    prices: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 1,
    group: dist.ProcessGroup | None = None,
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
    target = Target.of(scores, k, capacity, mask, RowGroup(group))
    if target.nothing_to_do(scores, k):
        return b if capacity is None else torch.zeros_like(b)
    for _ in range(steps):
        a_T1 = (scores - b.unsqueeze(-2)).topk(k + 1, dim=-1, sorted=True).values[..., k:]
        level = target.threshold(scores - a_T1)
        if capacity is not None:
            level = level.clamp(min=0.0)
        b = torch.where(level.isfinite(), level, b)
    return target.without_need(b)


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
    loads = loads if loads.is_floating_point() else loads.to(prices.dtype)
    mean = loads.mean(-1, keepdim=True)
    # A load that differs by the rounding of the mean is the mean: its price stays.
    rounding = 16 * torch.finfo(loads.dtype).eps * mean
    excess = torch.where((loads - mean).abs() <= rounding, 0.0, loads - mean)
    return prices + rate * torch.sign(excess).to(prices.dtype)


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
