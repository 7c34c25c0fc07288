"""BASE layers (arXiv 2103.16716): training assigns tokens to experts, all experts alike loaded.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.routing.assigning import balanced_choice
from monge.routing.checks import check_choice
from monge.routing.gates import top_k_of
from monge.routing.router import Batch, Choice, Router


class Base(Router):
    """In training the balanced assignment of largest total logit chooses; the gate is ``sigmoid(Z_te)``.

    The paper has k = 1; with more, each token gets k different experts and the gates are still independent
    sigmoids, not renormalised. No auxiliary loss. Training looks at the whole batch: not causal. Evaluation
    takes the top-k of Z: causal.

    Args:
        method: "exact", or "approximate", which does not leave an accelerator and can balance over the ranks
            of `monge.routing.use_group` (see ``MaxScore``).

    Source: arXiv 2103.16716. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> make_router("base", dim=8, num_experts=4, top_k=1)(torch.randn(12, 8)).loads.tolist()
        [3, 3, 3, 3]
    """

    causal_train = False

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, method: str = "exact", **common: Any
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_choice(method=(method, ("exact", "approximate")))
        self.method = method

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if self.training_route and (len(logits_TE) or not self.ranks.is_local):
            mask_1T = None if batch.mask_T is None else batch.mask_T[None]
            indices_1TK, _ = balanced_choice(
                logits_TE[None], self.top_k, mask=mask_1T, method=self.method, ranks=self.ranks
            )
            indices_TK = indices_1TK[0]
        else:
            indices_TK = top_k_of(logits_TE, self.top_k)
        return Choice(indices_TK, logits_TE.gather(1, indices_TK).sigmoid())
