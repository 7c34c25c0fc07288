"""The balanced assignment as routers need it: indices that can be gathered with, prices that can be carried.

Shapes: B problems, L tokens each, E experts, K slots per token.
"""

from __future__ import annotations

from torch import Tensor

from monge.ot import assign
from monge.ot.distributed import LOCAL, RowGroup


def balanced_choice(
    scores_BLE: Tensor,
    k: int,
    *,
    mask: Tensor | None,
    capacity_factor: float = 1.0,
    method: str = "exact",
    ranks: RowGroup = LOCAL,
) -> tuple[Tensor, Tensor]:
    """Indices (B, L, K) and prices (B, E) of B assignments of largest total score; no gradient.

    Every token gets k experts, an expert at most ``ceil(capacity_factor * valid tokens * k / E)`` tokens.
    Masked tokens point at expert 0, for the caller to empty. Prices have mean 0: a constant changes no
    choice, and problems without slack leave it open. The approximate method counts tokens and loads over
    ``ranks``; the exact one solves each rank's own.
    """
    group = ranks.group if method == "approximate" else None
    result = assign(
        scores_BLE.detach(), k, capacity_factor=capacity_factor, mask=mask, method=method, group=group
    )
    prices_BE = (result.prices - result.prices.mean(-1, keepdim=True)).to(scores_BLE.dtype)
    return result.indices.clamp(min=0), prices_BE
