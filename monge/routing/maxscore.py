"""MaxScore (arXiv 2508.12801): the balanced assignment of largest total score, as a minimum-cost flow.

Shapes: T tokens, E experts, K slots per token, B problems of L tokens each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monge.ot import soft_topk
from monge.ot.distributed import LOCAL
from monge.routing.assigning import balanced_choice
from monge.routing.checks import (
    check_at_least_one,
    check_choice,
    check_not_negative,
    check_positive,
    check_share,
)
from monge.routing.gates import annealed_gates, gates_of, normalised, scores_of, top_k_of
from monge.routing.losses import load_balance_loss, shared_balance
from monge.routing.router import Batch, Choice
from monge.routing.stepped import SteppedRouter


class MaxScore(SteppedRouter):
    """In training, ``max sum x_te S_te``: k experts per token, at most C tokens per expert.

    ``C = ceil(capacity_factor * T k / E)``. At capacity factor 1 the load is perfectly balanced (exactly so
    where E divides T k), nothing is dropped and nothing padded. Solved exactly, where the released code takes
    first choices greedily and matches the second. The dual prices b of the assignment are kept (exponential
    average over steps, made by `monge.step`): top-k of S - b is the assignment again, up to ties, and is
    causal.

    Causality: in training the assignment looks at the whole batch (or sequence), so a later token can change
    the route of an earlier one: not causal. Evaluation is: plain top-k of S, or of S - b with
    ``eval_prices``.

    On an accelerator ``method="exact"`` copies the scores to the host and waits for them in every training
    forward; "approximate" stays on the device, still never exceeds the capacity, and comes within about 0.1%
    of the optimum.

    Over several ranks "exact" is per rank: each solves the assignment of its own tokens, balanced on every
    rank and so in total, and `monge.step` averages the kept prices. "approximate" with
    `monge.routing.use_group` assigns the tokens of all ranks together (unless ``per="sequence"``): an expert
    may take more of one rank's tokens where it takes fewer of another's.

    Args:
        scores: S, "softmax" P (the paper) or "logits" Z.
        per: one problem per "batch" or per "sequence" (the next-to-last dimension; the released code's way).
        gates: "renormalised": P of the chosen divided by its sum. "soft_topk": the relaxed top-k of S - b
            (rows in [0, 1] summing to k, arXiv 2002.06504) of the chosen, divided by its sum. "annealed": the
            released code's SoftTopk, P of the first choice and t * P of the others, t falling linearly from
            ``anneal_from`` to 1 over ``anneal_steps`` steps, not renormalised.
        anneal_from, anneal_steps: of "annealed".
        temperature: of "soft_topk", in units of S.
        coefficient: of the GShard loss on first choices which the released code adds (0.01 there); 0 by
            default, the assignment balances without.
        capacity_factor: at least 1.
        method: "exact" or "approximate", see above.
        momentum: share of the old prices that stays at each step.
        eval_prices: whether evaluation subtracts the kept prices; an attribute that may be set at any time.
        flow: False leaves the assignment out, also in training: plain top-k of S with the gates and the loss
            asked for, the other half of the paper's ablation. Causal then, and no prices are kept.

    Source: arXiv 2508.12801; kept prices are this library's. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("maxscore", dim=8, num_experts=4, top_k=2)
        >>> router(torch.randn(6, 8)).loads.tolist()
        [3, 3, 3, 3]
    """

    needs_step = True
    causal_train = False
    prices: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        scores: str = "softmax",
        per: str = "batch",
        gates: str = "renormalised",
        anneal_from: float = 4.0,
        anneal_steps: int = 30_000,
        temperature: float = 0.1,
        coefficient: float = 0.0,
        capacity_factor: float = 1.0,
        method: str = "exact",
        momentum: float = 0.5,
        eval_prices: bool = False,
        flow: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_choice(
            scores=(scores, ("softmax", "logits")),
            per=(per, ("batch", "sequence")),
            gates=(gates, ("renormalised", "soft_topk", "annealed")),
            method=(method, ("exact", "approximate")),
        )
        check_not_negative(coefficient=coefficient, anneal_from=anneal_from)
        check_at_least_one(capacity_factor=capacity_factor, anneal_steps=anneal_steps)
        check_positive(temperature=temperature)
        check_share(momentum=momentum)
        self.scores, self.per, self.gate_form, self.method = scores, per, gates, method
        self.anneal_from, self.anneal_steps, self.temperature = anneal_from, anneal_steps, temperature
        self.coefficient, self.capacity_factor, self.momentum = coefficient, capacity_factor, momentum
        self.eval_prices, self.flow = eval_prices, flow
        self.causal_train = not flow
        self.register_state("prices", torch.zeros(num_experts, device=self.weight.device))
        self.register_state("steps", torch.zeros((), device=self.weight.device))

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        scores_TE = scores_of(logits_TE, self.scores)
        prices_E: Tensor | None
        if self.flow and self.training_route and (len(scores_TE) or not self.ranks.is_local):
            indices_TK, prices_E, priced_TE = self._by_flow(scores_TE, batch)
        else:
            prices_E = self.prices.clone() if self.eval_prices else None
            priced_TE = scores_TE if prices_E is None else scores_TE - prices_E
            indices_TK = top_k_of(priced_TE.detach(), self.top_k)
        gates_TK = self._gates(logits_TE, priced_TE, indices_TK)
        loss = None
        if self.coefficient and self.training:
            shares_E, count = shared_balance(
                indices_TK[:, :1], self.num_experts, mask=batch.mask_T, rows=self.ranks
            )
            probs_TE = logits_TE.softmax(dim=1)
            loss = self.coefficient * load_balance_loss(probs_TE, shares_E, mask=batch.mask_T, count=count)
        return Choice(indices_TK, gates_TK, loss, prices_E)

    def _by_flow(self, scores_TE: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (T, K), the mean over problems of the prices (E,), and S - b (T, E), b of each problem."""
        B, L = batch.sequences if self.per == "sequence" else (1, len(scores_TE))
        mask_BL = None if batch.mask_T is None else batch.mask_T.reshape(B, L)
        scores_BLE = scores_TE.reshape(B, L, self.num_experts)
        indices_BLK, prices_BE = balanced_choice(
            scores_BLE,
            self.top_k,
            mask=mask_BL,
            capacity_factor=self.capacity_factor,
            method=self.method,
            ranks=self.ranks if self.per == "batch" else LOCAL,
        )
        if mask_BL is None:
            prices_E = prices_BE.mean(0)
        else:  # problems count by their valid tokens
            weights_B1 = mask_BL.sum(1, keepdim=True, dtype=prices_BE.dtype)
            prices_E = (prices_BE * weights_B1).sum(0) / weights_B1.sum().clamp(min=1)
        self.collect(prices_E, batch)
        return indices_BLK.flatten(0, 1), prices_E, (scores_BLE - prices_BE[:, None]).flatten(0, 1)

    def _gates(self, logits_TE: Tensor, priced_TE: Tensor, indices_TK: Tensor) -> Tensor:
        if self.gate_form == "renormalised":
            return gates_of(logits_TE, indices_TK)
        if self.gate_form == "annealed":
            return annealed_gates(
                logits_TE, indices_TK, self.steps, start=self.anneal_from, duration=self.anneal_steps
            )
        relaxed_TE = soft_topk(priced_TE, self.top_k, temperature=self.temperature)
        return normalised(relaxed_TE.gather(1, indices_TK))

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        self.blend_prices(mean_E, seen, self.momentum)
