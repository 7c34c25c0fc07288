"""The relaxed top-k: rows in [0, 1] that sum to k and can be differentiated.

Shapes: E columns; ``...`` any leading dimensions, each row a problem of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Newton's method on the balance below reaches rounding error in at most 6 steps on all that was tried.
ITERATIONS = 7


def soft_topk(scores: Tensor, k: int, *, temperature: float = 0.1) -> Tensor:
    """Differentiable top-k: ``x_e = sigmoid((s_e - tau) / temperature)``, tau such that ``sum_e x_e = k``.

    x solves ``max sum_e x_e s_e + temperature * sum_e H(x_e)`` over ``sum_e x_e = k``, H the entropy of a
    coin: the entropic transport of the E columns onto the two points 'chosen' (mass k) and 'not chosen'
    (mass E - k). As the temperature falls to 0, x tends to the indicator of the k largest scores; equal
    scores get equal shares.

    tau is solved per row in float64 for any scale of scores and temperature. Backward is the closed form of
    the implicit derivative, ``dx = w / temperature * (ds - sum(w ds) / sum(w))`` with ``w = x (1 - x)``. It
    can be taken once.

    Args:
        scores: (..., E), any float dtype. -inf gives 0.
        k: how many, 1 <= k <= E. k = E gives ones, as does a row of exactly k finite scores on those.
        temperature: > 0, in the units of the scores.

    Returns:
        (..., E), in at least float32.

    Raises:
        ValueError: a bad argument; on the CPU outside ``torch.compile``, where looking costs no
            synchronisation, also NaN, +inf, or fewer than k finite scores in a row.

    Source: Xie et al., 'Differentiable Top-k with Optimal Transport', arXiv 2002.06504.

    Examples:
        >>> import torch
        >>> from monge.ot import soft_topk
        >>> soft_topk(torch.tensor([2.0, 1.0, 1.0, -torch.inf]), 2, temperature=0.5)
        tensor([0.9003, 0.5499, 0.5499, 0.0000])
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
    if scores.ndim < 1 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be a floating-point tensor (..., E), got {scores.dtype} {tuple(scores.shape)}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be an integer in 1..E = {scores.shape[-1]}, got {k!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        _reject_values(scores.detach(), k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return _SoftTopK.apply(scores, k, temperature)


class _SoftTopK(torch.autograd.Function):
    """Forward solves for tau; backward needs only w, saved in the type of the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, temperature: float) -> Tensor:
        x, w = _solve(scores, k, temperature)
        ctx.save_for_backward(w.to(scores.dtype))
        ctx.temperature = temperature
        return x.to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (w,) = ctx.saved_tensors
        total = w.sum(-1, keepdim=True)
        mean = (w * grad).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return w * (grad - mean) / ctx.temperature, None, None


def _solve(scores: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """x and x (1 - x), both float64.

    Let u = (s - s_(k)) / temperature, s_(k) the k-th largest, so that u is exact near the threshold z. The
    row sums to k when what the k largest lack, ``D(z) = sum sigmoid(z - u)``, equals what the others have,
    ``X(z) = sum sigmoid(u - z)``. Where both are small the difference is flat in z and Newton's method fails
    on it; log D - log X has a slope near 2 there.
    """
    finite = scores > -torch.inf
    if k == scores.shape[-1]:
        return finite.to(torch.float64), torch.zeros_like(scores, dtype=torch.float64)
    scores = scores.to(torch.float64)
    count = finite.sum(-1, keepdim=True)
    ordered = scores.sort(-1, descending=True).values
    origin = torch.where(count < k, 0.0, ordered[..., k - 1 : k])
    # Beyond +-1e6 temperatures a sigmoid is 0 or 1 whatever z is; the clamp keeps the bracket finite.
    ordered = ((ordered - origin) / temperature).clamp(-1e6, 1e6)
    # At u_(k+1) - log k the sum is at least k, at log(E - k) at most; 1 more keeps a root at the end inside.
    low = ordered[..., k : k + 1] - math.log(k) - 1.0
    high = (count - k).clamp(min=1).to(torch.float64).log() + 1.0
    z = 0.5 * (low + high)
    sign = torch.ones(scores.shape[-1], dtype=torch.float64, device=scores.device)
    sign[:k] = -1.0
    for _ in range(ITERATIONS):
        # What the first k lack and what the others have, each to full relative precision.
        share = torch.sigmoid(sign * (ordered - z))
        weight = share * (1.0 - share)
        lack = share[..., :k].sum(-1, keepdim=True).clamp(min=1e-300)
        excess = share[..., k:].sum(-1, keepdim=True).clamp(min=1e-300)
        balance = (lack / excess).log()
        low = torch.where(balance < 0, z, low)
        high = torch.where(balance > 0, z, high)
        slope = weight[..., :k].sum(-1, keepdim=True) / lack + weight[..., k:].sum(-1, keepdim=True) / excess
        newton = z - balance / slope.clamp(min=1e-3)
        z = torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
    u = (scores - origin) / temperature
    x, w = torch.sigmoid(u - z), torch.sigmoid(u - z) * torch.sigmoid(z - u)
    forced = count <= k
    return torch.where(forced, finite.to(torch.float64), x), torch.where(forced, 0.0, w)


def _reject_values(scores: Tensor, k: int) -> None:
    bad = scores.isnan() | (scores == torch.inf)
    if bool(bad.any()):
        raise ValueError(
            f"scores must be finite or -inf: {int(bad.sum())} of {scores.numel()} are NaN or +inf, the first "
            f"at {tuple(bad.nonzero()[0].tolist())}"
        )
    short = (scores > -torch.inf).sum(-1) < k
    if bool(short.any()):
        raise ValueError(
            f"every row needs at least k = {k} finite scores: {int(short.sum())} rows have fewer; lower k "
            "or forbid (-inf) fewer columns"
        )
