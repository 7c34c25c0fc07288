"""Switch / GShard (arXiv 2101.03961, 2006.16668): softmax top-k with a load-balance loss.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monge.routing.checks import check_choice, check_not_negative
from monge.routing.gates import gates_of, top_k_of
from monge.routing.losses import load_balance_loss, sequence_balance_loss, shared_balance
from monge.routing.router import Batch, Choice
from monge.routing.stepped import SteppedRouter


class Switch(SteppedRouter):
    """Softmax top-k plus ``coefficient * E * sum_e f_e * mean_t P_te``, f_e the share of slots on expert e.

    The usual answer to imbalance, and a strong one; it pulls the logits away from what the task alone would
    choose. Routes are causal in training and evaluation (the loss looks at the batch, a route does not).

    Args:
        coefficient: of the loss; 0.01 is the common value.
        scope: where f is counted. "batch": this forward, on this rank or on all those of
            `monge.routing.use_group`. "sequence": each sequence on its own, averaged. "global": all
            micro-batches and ranks of the previous optimizer step, exchanged by `monge.step`; this batch's f
            before the first.
        renormalise: as in ``TopK``.

    Sources: arXiv 2101.03961, eq. 4 to 6 ("batch"); 2412.19437, eq. 17 ("sequence"); 2501.11873 ("batch" over
    a group; "global" is its f of the step before). Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("switch", dim=4, num_experts=4, top_k=1, coefficient=0.5)
        >>> _ = router.weight.data.zero_()  # P = 1/E makes the loss 1 whatever the choice
        >>> router(torch.randn(6, 4)).aux_loss.item()
        0.5
    """

    shares: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        coefficient: float = 0.01,
        scope: str = "batch",
        renormalise: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_not_negative(coefficient=coefficient)
        check_choice(scope=(scope, ("batch", "sequence", "global")))
        self.coefficient, self.scope, self.renormalise = coefficient, scope, renormalise
        self.needs_step = scope == "global"
        if scope == "global":
            self.register_state("shares", torch.zeros(num_experts, device=self.weight.device))

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        indices_TK = top_k_of(logits_TE, self.top_k)
        gates_TK = gates_of(logits_TE, indices_TK, renormalise=self.renormalise)
        if not self.training:
            return Choice(indices_TK, gates_TK)
        probs_TE = logits_TE.softmax(dim=1)
        if self.scope == "sequence":
            loss = sequence_balance_loss(
                probs_TE, indices_TK, batch.sequences[1], mask=batch.mask_T, group=self.ranks.group
            )
        else:
            shares_E, count = shared_balance(indices_TK, self.num_experts, mask=batch.mask_T, rows=self.ranks)
            if self.scope == "global":
                self.collect(shares_E, batch)
                shares_E = torch.where(self.shares.sum() > 0, self.shares, shares_E)
            loss = load_balance_loss(probs_TE, shares_E, mask=batch.mask_T, count=count)
        return Choice(indices_TK, gates_TK, self.coefficient * loss)

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        if self.scope == "global":
            self.shares.copy_(torch.where(seen, mean_E, self.shares))
