"""Price-balanced routing, the library's default: carried prices on the logits, in the choice and in the
gates.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.ot import margin_prices
from monge.routing.checks import check_choice, check_share
from monge.routing.gates import gates_of
from monge.routing.priced import PricedRouter
from monge.routing.router import Batch


class Prices(PricedRouter):
    """``experts = top-k of Z_t - b``, gates = softmax over the chosen of ``Z_t - b``; b follows the batch.

    b_e is the price of expert e, the dual variable of "no expert gets more than its share" in the
    assignment problem that MaxScore solves (arXiv 2508.12801), whose solution is the top-k of ``Z_t - b``
    for every token. With the b of the last step the choice is nearly balanced, needs no solver, and depends
    on its own token alone: causal in training and evaluation, by the same code. After each optimizer step
    `monge.step` moves ``b <- momentum * b + (1 - momentum) * b'``, b' one margin step of
    `monge.ot.margin_prices` from b, averaged over micro-batches and ranks (or one step from the rows of all
    ranks, with `monge.routing.use_group`). No auxiliary loss. The frozen b
    is part of the checkpoint: without it, inference is unbalanced and loses quality.

    Relation to others. Quantile balancing (https://kexue.fm/archives/11619, router ``quantile``) carries
    prices too, but its step treats every expert as an outsider to every token: it compares all scores with
    the (k+1)-th largest. The margin step compares a chosen expert with the (k+1)-th and an outsider with
    the k-th, the point where the choice really flips, so fewer slots are misplaced after a step.
    DeepSeek-V3 (arXiv 2408.15664, router ``lossfree``) moves the same b by a constant times the sign of the
    overload. Both take their gates from the raw scores. Priced gates have no jump where the choice flips,
    because the expert that leaves and the one that enters weigh the same there.

    Args:
        gates: "priced", as above, or "raw", softmax over the chosen of Z_t, the form standard architectures
            hold.
        scores: what the prices are subtracted from to choose, the "logits" Z as above, their "softmax" or
            "sigmoid". The last two go with raw gates, of the same kind: "sigmoid" is the gate of DeepSeek-V3,
            which holds -b as its bias.
        momentum: share of the old b that stays.
        renormalise: False takes the softmax over all experts; None means True where top_k > 1.

    Other arguments: ``Router``.

    Examples:
        >>> import torch, monge
        >>> router = monge.make_router("prices", dim=4, num_experts=4, top_k=1, bias=True)
        >>> router.bias.data[0] = 1.0  # expert 0 takes all at first
        >>> hidden = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> before = router(hidden).max_violation
        >>> for _ in range(8):
        ...     _ = router(hidden); monge.step(router)
        >>> before > 2.5, router.eval()(hidden).max_violation < 0.3
        (True, True)
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        gates: str = "priced",
        scores: str = "logits",
        momentum: float = 0.5,
        renormalise: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, renormalise=renormalise, **common)
        check_choice(gates=(gates, ("priced", "raw")), scores=(scores, ("logits", "softmax", "sigmoid")))
        check_share(momentum=momentum)
        if scores != "logits" and gates == "priced":
            raise ValueError(
                f"gates='priced' subtracts the prices from the logits, and scores={scores!r} gives prices of "
                "another unit: pass gates='raw', or leave scores at 'logits'"
            )
        self.gate_scores, self.scores, self.momentum = gates, scores, momentum

    def gates(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        gate_logits_TE = logits_TE - self.prices if self.gate_scores == "priced" else logits_TE
        return gates_of(gate_logits_TE, indices_TK, kind=self.scores, renormalise=self.renormalise)

    def statistic(self, scores_TE: Tensor, indices_TK: Tensor, batch: Batch) -> Tensor:
        return margin_prices(
            scores_TE, self.top_k, prices=self.prices, mask=batch.mask_T, group=self.ranks.group
        )

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        self.blend_prices(mean_E, seen, self.momentum)
