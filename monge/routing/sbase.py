"""S-BASE (arXiv 2202.01169): a Sinkhorn plan chooses, softmax gates weigh.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.ot import sinkhorn
from monge.routing.checks import check_at_least_one, check_not_negative, check_positive
from monge.routing.gates import gates_of, top_k_of
from monge.routing.router import Batch, Choice, Router


class SBase(Router):
    """In training experts = top-k of the entropic plan on Z; gates are softmax(Z) at the chosen,
    renormalised.

    The plan only chooses and gets no gradient: that is the difference from SSR, where its entries are the
    gates. Training looks at the whole batch: not causal. Evaluation takes the top-k of Z: causal.

    Args:
        epsilon: strength of the entropy, in units of Z.
        iterations: Sinkhorn iterations at most; tol: stop when both marginal errors are below it.
        renormalise: divide the gates by their sum; None means where top_k > 1.

    Source: arXiv 2202.01169, section 3. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("sbase", dim=8, num_experts=4, top_k=2, bias=True)
        >>> router.bias.data[0] = 3.0  # hidden by the plan, back at evaluation
        >>> hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> router(hidden).max_violation < 0.5, router.eval()(hidden).max_violation
        (True, 1.0)
    """

    causal_train = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        epsilon: float = 1.0,
        iterations: int = 20,
        tol: float = 1e-4,
        renormalise: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        check_positive(epsilon=epsilon)
        check_not_negative(tol=tol)
        check_at_least_one(iterations=iterations)
        self.epsilon, self.iterations, self.tol, self.renormalise = epsilon, iterations, tol, renormalise

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        priced_TE = logits_TE.detach()
        if self.training_route:
            plan = sinkhorn(
                priced_TE,
                epsilon=self.epsilon,
                mask=batch.mask_T,
                tol=self.tol,
                max_iters=self.iterations,
                backward="none",
                group=self.ranks.group,
            )
            # The order of a row of the plan, without its underflow.
            priced_TE = priced_TE + self.epsilon * plan.log_v.to(priced_TE.dtype)
        indices_TK = top_k_of(priced_TE, self.top_k)
        return Choice(indices_TK, gates_of(logits_TE, indices_TK, renormalise=self.renormalise))
