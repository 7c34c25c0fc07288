"""Softmax top-k (arXiv 2006.16668 and 2401.04088): the k experts of the largest logits, nothing balanced.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.routing.gates import gates_of, top_k_of
from monge.routing.router import Batch, Choice, Router


class TopK(Router):
    """``experts = top-k of Z_t``, gates = softmax(Z_t) at the chosen experts, renormalised to sum 1.

    The plain router of Mixtral, and what SSR and MaxScore use at inference. Nothing keeps it balanced; choose
    it as the baseline. Causal in training and evaluation.

    Args:
        renormalise: divide the gates by their sum; None means where top_k > 1 (a single renormalised gate is
            constant, so the router would get no gradient).

    Source: arXiv 2401.04088, section 2.1 (Mixtral). Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("topk", dim=2, num_experts=3, top_k=2)
        >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        >>> routing = router(torch.tensor([[2.0, 1.0]]))
        >>> routing.indices.tolist(), [round(w, 3) for w in routing.weights[0].tolist()]
        ([[0, 1]], [0.731, 0.269])
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, renormalise: bool | None = None, **common: Any
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        self.renormalise = renormalise

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        indices_TK = top_k_of(logits_TE, self.top_k)
        return Choice(indices_TK, gates_of(logits_TE, indices_TK, renormalise=self.renormalise))
