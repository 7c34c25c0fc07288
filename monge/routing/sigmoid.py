"""Sigmoid top-k (arXiv 2412.19437, without its bias): every expert scored on its own.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.routing.gates import gates_of, top_k_of
from monge.routing.router import Batch, Choice, Router


class Sigmoid(Router):
    """``experts = top-k of Z_t``, gates = sigmoid(Z_t) at the chosen experts, renormalised to sum 1.

    Scores do not compete as under a softmax, so raising one expert's logit lowers no other's score.
    DeepSeek-V3's router without the balancing bias; ``lossfree`` has it. Causal in training and evaluation.

    Args:
        renormalise: divide the gates by their sum; None means where top_k > 1.

    Source: arXiv 2412.19437, eq. 13 to 15. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("sigmoid", dim=2, num_experts=3, top_k=1)
        >>> _ = router.weight.data.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
        >>> round(router(torch.tensor([[2.0, 1.0]])).weights.item(), 3)
        0.881
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, renormalise: bool | None = None, **common: Any
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        self.renormalise = renormalise

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        indices_TK = top_k_of(logits_TE, self.top_k)
        return Choice(
            indices_TK, gates_of(logits_TE, indices_TK, kind="sigmoid", renormalise=self.renormalise)
        )
