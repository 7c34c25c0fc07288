"""Quantile balancing (kexue.fm 11619): prices from the quantiles of the batch.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.ot import quantile_prices
from monge.routing.checks import check_choice, check_share
from monge.routing.priced import PricedRouter
from monge.routing.router import Batch


class Quantile(PricedRouter):
    """``experts = top-k of S_t - b``, gates from S; after a step b moves to the quantile prices of the batch.

    With the old b, ``a_t`` is the (k+1)-th largest of ``S_t - b`` and the proposal for ``b_e`` the
    (floor(T k / E) + 1)-th largest of ``S_te - a_t``; proposals are averaged over micro-batches and ranks,
    and ``b <- momentum * b + (1 - momentum) * proposal``. Causal in training and evaluation.

    Args:
        momentum: share of the old b that stays; 0 forgets it.
        scores: "softmax" (default), "sigmoid" or "logits".
        renormalise: as in ``PricedRouter``.

    Source: https://kexue.fm/archives/11619. Other arguments: ``Router``.

    Examples:
        >>> import torch, monge
        >>> router = monge.make_router("quantile", dim=4, num_experts=4, top_k=1, bias=True)
        >>> router.bias.data[0] = 1.0
        >>> _ = router(torch.randn(64, 4)); monge.step(router)
        >>> int(router.prices.argmax())
        0
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        momentum: float = 0.5,
        scores: str = "softmax",
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_choice(scores=(scores, ("softmax", "sigmoid", "logits")))
        check_share(momentum=momentum)
        self.momentum, self.scores = momentum, scores

    def statistic(self, scores_TE: Tensor, indices_TK: Tensor, batch: Batch) -> Tensor:
        return quantile_prices(
            scores_TE, self.top_k, prices=self.prices, mask=batch.mask_T, group=self.ranks.group
        )

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        self.blend_prices(mean_E, seen, self.momentum)
