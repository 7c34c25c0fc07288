"""Routers that choose by ``S - b`` with prices b carried from step to step: ``prices``, ``quantile``,
``lossfree``.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monge.routing.gates import gates_of, scores_of, top_k_of
from monge.routing.router import Batch, Choice, recomputing
from monge.routing.stepped import SteppedRouter


class PricedRouter(SteppedRouter):
    """``experts = top-k of S_t - b``. A method says what it collects and how b follows from it.

    Between two calls of `monge.step` b is a constant, in training as at evaluation, so a route depends on its
    own token alone: causal in training and evaluation. State dict: ``prices`` (E,) and ``steps``.

    The attribute ``scores`` says what S is: the "logits", their "softmax" over experts or their "sigmoid".

    Args:
        renormalise: divide the gates by their sum; None means where top_k > 1.
    """

    needs_step = True
    prices: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        renormalise: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        self.scores = "logits"
        self.renormalise = renormalise
        self.register_state("prices", torch.zeros(num_experts, device=self.weight.device))
        self.register_state("steps", torch.zeros((), device=self.weight.device))

    def statistic(self, scores_TE: Tensor, indices_TK: Tensor, batch: Batch) -> Tensor:
        """(E,) of this batch; ``update`` gets its mean over tokens of all micro-batches and ranks."""
        raise NotImplementedError

    def gates(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """(T, K), from the scores without prices: prices say who, not how much."""
        return gates_of(logits_TE, indices_TK, kind=self.scores, renormalise=self.renormalise)

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        # A copy: `monge.step` writes the buffer in place, while this Routing may be kept.
        prices_E = self.prices.clone()
        scores_TE = scores_of(logits_TE.detach(), self.scores)
        indices_TK = top_k_of(scores_TE - prices_E, self.top_k)
        if self.collecting and not recomputing():
            self.collect(self.statistic(scores_TE, indices_TK, batch), batch)
        return Choice(indices_TK, self.gates(logits_TE, indices_TK), prices_E=prices_E)
