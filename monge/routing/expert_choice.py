"""Expert choice (arXiv 2202.09368): every expert takes the tokens that want it most.

Shapes: T tokens, E experts, C capacity of an expert.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from monge.routing.checks import check_positive
from monge.routing.gates import top_k_of
from monge.routing.router import Batch, Choice, Router


class ExpertChoice(Router):
    """Expert e takes the C tokens of largest ``P_te``, ``C = ceil(capacity_factor * T * k / E)``; gates are
    P_te.

    Perfectly balanced; a token gets from none to E experts, so ``Routing`` has K = E slots, slot e for expert
    e (-1 where e did not take the token). Not causal in training: whether an expert takes a token depends on
    all the others, later ones included, which an autoregressive model can exploit and cannot have when it
    generates. Evaluation is per token by default, softmax top-k with the same gates, and then causal.

    Args:
        capacity_factor: as above; 1 makes k experts per token on average.
        per_token_eval: False evaluates as the paper does, over the batch (not causal).

    Source: arXiv 2202.09368, section 3.2. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> make_router("expert_choice", dim=4, num_experts=4, top_k=2)(torch.randn(10, 4)).loads.tolist()
        [5, 5, 5, 5]
    """

    causal_train = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        capacity_factor: float = 1.0,
        per_token_eval: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_positive(capacity_factor=capacity_factor)
        self.capacity_factor, self.per_token_eval = capacity_factor, per_token_eval
        self.causal_eval = per_token_eval

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        probs_TE = logits_TE.softmax(dim=1)
        if self.training_route or not self.per_token_eval:
            taken_TE = self._choice_of_experts(probs_TE.detach(), batch)
        else:
            taken_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
            taken_TE = taken_TE.scatter(1, top_k_of(logits_TE, self.top_k), True)
        experts_E = torch.arange(self.num_experts, device=logits_TE.device)
        return Choice(torch.where(taken_TE, experts_E, -1), torch.where(taken_TE, probs_TE, 0.0))

    def _choice_of_experts(self, probs_TE: Tensor, batch: Batch) -> Tensor:
        T = len(probs_TE)
        share = self.capacity_factor * self.top_k / self.num_experts
        # Shapes follow T alone; with a mask an expert's last ranks stay empty, as many as its masked tokens
        # are worth.
        capacity = min(math.ceil(share * T - 1e-6), T)
        if batch.mask_T is not None:
            probs_TE = torch.where(batch.mask_T[:, None], probs_TE, -1.0)
        rows_CE = probs_TE.topk(capacity, dim=0).indices
        ranks_C1 = torch.arange(capacity, device=probs_TE.device)[:, None]
        within_CE = (ranks_C1 < torch.ceil(share * batch.num_valid() - 1e-6)).expand_as(rows_CE)
        return torch.zeros_like(probs_TE, dtype=torch.bool).scatter(0, rows_CE, within_CE)
