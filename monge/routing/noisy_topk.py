"""Noisy top-k (arXiv 1701.06538): a learned Gaussian noise on the logits and two balance losses.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.routing.checks import check_not_negative
from monge.routing.gates import gates_of, top_k_of
from monge.routing.losses import shared_sum, squared_cv
from monge.routing.router import Batch, Choice, Router


class NoisyTopK(Router):
    """``H = Z + N(0,1) * softplus(X W_noise)``; experts = top-k of H, gates = softmax over the chosen of H.

    In training the losses ``coefficient * (CV^2(importance) + CV^2(load))`` balance the sum of gates and,
    through the probability of staying in the top-k when the noise is drawn anew, the number of tokens.
    Without noise at evaluation. Causal in training (the noise of a token is its own) and evaluation.

    ``training_routes`` draws the noise from torch's global generator: seed it to compare two measurements.

    Args:
        coefficient: of both losses (w_importance and w_load of the paper, 0.1 there in the smaller models).
        renormalise: divide the gates by their sum; None means where top_k > 1.

    Source: arXiv 1701.06538, section 2.1 and appendix A. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("noisy_topk", dim=4, num_experts=3, top_k=2)
        >>> routing = router.eval()(torch.ones(5, 4))
        >>> routing.loads.max().item(), routing.aux_loss
        (5, None)
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        coefficient: float = 0.01,
        renormalise: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_not_negative(coefficient=coefficient)
        self.coefficient, self.renormalise = coefficient, renormalise
        # Zero, as in the paper: softplus(0) = 0.69 of noise for every token at the start.
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if not self.training_route:
            indices_TK = top_k_of(logits_TE, self.top_k)
            return Choice(indices_TK, gates_of(logits_TE, indices_TK, renormalise=self.renormalise))
        scale_TE = F.softplus(
            F.linear(batch.hidden_TD.to(logits_TE.dtype), self.noise_weight.to(logits_TE.dtype))
        )
        noisy_TE = logits_TE + torch.randn_like(logits_TE) * scale_TE
        indices_TK = top_k_of(noisy_TE, self.top_k)
        gates_TK = gates_of(noisy_TE, indices_TK, renormalise=self.renormalise)
        if not self.training:
            return Choice(indices_TK, gates_TK)
        return Choice(
            indices_TK, gates_TK, self._loss(logits_TE, noisy_TE, scale_TE, indices_TK, gates_TK, batch)
        )

    def _loss(
        self,
        logits_TE: Tensor,
        noisy_TE: Tensor,
        scale_TE: Tensor,
        indices_TK: Tensor,
        gates_TK: Tensor,
        batch: Batch,
    ) -> Tensor:
        valid_T1 = torch.ones_like(logits_TE[:, :1]) if batch.mask_T is None else batch.mask_T[:, None]
        importance_E = torch.zeros_like(logits_TE).scatter(1, indices_TK, gates_TK * valid_T1).sum(0)
        sums_E = importance_E
        if self.top_k < self.num_experts:  # otherwise every expert has every token
            top_TK = noisy_TE.topk(self.top_k + 1, dim=1).values
            kth_T1, next_T1 = top_TK[:, -2:-1], top_TK[:, -1:]
            # The score to beat, the k-th largest of the others: for a chosen expert the (k+1)-th of all.
            to_beat_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)
            stays_TE = torch.special.ndtr((logits_TE - to_beat_TE) / scale_TE)
            sums_E = torch.cat([importance_E, (stays_TE * valid_T1).sum(0)])
        parts = shared_sum(sums_E, self.ranks).split(self.num_experts)
        return self.coefficient * torch.stack([squared_cv(part_E) for part_E in parts]).sum()
