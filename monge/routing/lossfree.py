"""Loss-free balancing (arXiv 2408.15664, DeepSeek-V3): a bias per expert, moved by the sign of its overload.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monge.ot import sign_prices
from monge.routing.checks import check_choice, check_not_negative
from monge.routing.losses import slot_loads
from monge.routing.priced import PricedRouter
from monge.routing.router import Batch
from monge.routing.stepped import wide


class LossFree(PricedRouter):
    """``experts = top-k of S_t - b``, gates from S; after a step ``b_e += rate * sign(load_e - mean load)``.

    b is minus DeepSeek-V3's ``e_score_correction_bias``. One step of fixed length whatever the imbalance, so
    slow where it is large and jittering where it is small; ``quantile`` and ``prices`` compute the step
    instead. Causal in training and evaluation.

    Args:
        rate: the step in units of the scores. 0.001 in the papers, over many thousands of steps; the default
            0.01 suits runs of some hundreds.
        scores: "sigmoid" (as in both papers), "softmax" or "logits".
        renormalise: as in ``PricedRouter``.

    Source: arXiv 2408.15664, algorithm 1; 2412.19437, section 2.1.2. Other arguments: ``Router``.

    Examples:
        >>> import torch, monge
        >>> router = monge.make_router("lossfree", dim=4, num_experts=4, top_k=1, bias=True, rate=0.1)
        >>> router.bias.data[0] = 1.0  # expert 0 takes all
        >>> _ = router(torch.zeros(8, 4)); monge.step(router)
        >>> router.prices
        tensor([ 0.1000, -0.1000, -0.1000, -0.1000])
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        rate: float = 0.01,
        scores: str = "sigmoid",
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_choice(scores=(scores, ("softmax", "sigmoid", "logits")))
        check_not_negative(rate=rate)
        self.rate, self.scores = rate, scores

    def statistic(self, scores_TE: Tensor, indices_TK: Tensor, batch: Batch) -> Tensor:
        loads_E = slot_loads(indices_TK, self.num_experts, mask=batch.mask_T)
        return loads_E.to(wide(loads_E.device)) / batch.num_valid().clamp(min=1)

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        self.prices.copy_(torch.where(seen, sign_prices(self.prices, mean_E, self.rate), self.prices))
