"""Selective Sinkhorn Routing (arXiv 2511.08972): gates from an entropic transport plan on a few of the steps.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from monge.ot import sinkhorn
from monge.ot.distributed import RowGroup
from monge.routing.checks import check_at_least_one, check_choice, check_not_negative, check_positive
from monge.routing.gates import gates_of, normalised, scores_of, top_k_of
from monge.routing.router import Batch, Choice
from monge.routing.stepped import SteppedRouter


class SSR(SteppedRouter):
    """With probability p a training step routes by the balanced plan Pi, otherwise by plain softmax top-k.

    ``Pi = argmax <Pi, S> + epsilon * H(Pi)`` over plans whose rows sum to 1 and columns to T / E. On a
    transport step experts = top-k of Pi_t and gates = those entries divided by their sum, differentiated
    through Sinkhorn. No auxiliary loss. Inference is plain softmax top-k.

    The branch of each layer is a Python bool drawn by `monge.step` from (seed, step, layer): every rank,
    micro-batch and recomputation of a step takes the same. Before the first `monge.step`, and after loading a
    state dict, it is drawn from the step at hand in the same way; with ``carry`` step 0 always transports.
    ``ot_steps`` counts the steps that did. (Under ``torch.compile`` the branch is a guard: compile layer by
    layer, so that two graphs suffice.)

    Causality: a transport step looks at the whole batch, so training is not causal (unless p = 0); evaluation
    is.

    Systematic imbalance is not repaired by transport steps. Adding a constant to a column of S changes
    only the column's potential, ``Pi(S + 1 c^T) = Pi(S)``, because columns are rescaled to their mass anyway.
    So the gradient through Sinkhorn to a per-expert bias is exactly zero (numerically 1e-7 of softmax's; a
    test shows it): a bias that overloads some experts is hidden on transport steps, never corrected, and back
    at inference. ``carry=True`` keeps the column potentials as prices b of all other steps and of inference,
    top-k and gates of softmax((S - b) / epsilon), which repairs it.

    Args:
        p: probability of a transport step; 0.001 to 0.01 in the paper. Short runs need more: look at
            ``ot_steps``.
        epsilon: strength of the entropy; 0.5 to 1 for S = Z, 0.05 for S = P.
        sigma: standard deviation of Gaussian noise added to S on transport steps.
        scores: S, the "logits" Z or their "softmax" P.
        gates: "plan", as above, or "softmax": the plan only chooses, P weighs.
        iterations: Sinkhorn iterations at most; tol: stop when both marginal errors are below it.
        backward: gradient through Sinkhorn, "implicit" or "unrolled" (see `monge.ot.sinkhorn`).
        carry: keep the column potentials, see above.
        renormalise: divide the gates by their sum; None means where top_k > 1.

    Source: arXiv 2511.08972 v2; carried potentials are this library's. Other arguments: ``Router``.

    Examples:
        >>> import torch, monge
        >>> router = monge.make_router("ssr", dim=8, num_experts=4, top_k=2, p=1.0)
        >>> routing = router(torch.randn(64, 8)); monge.step(router)
        >>> routing.max_violation < 0.5, int(router.ot_steps)
        (True, 1)
    """

    needs_step = True
    ot_steps: Tensor
    prices: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        p: float = 0.01,
        epsilon: float = 1.0,
        sigma: float = 0.0,
        scores: str = "logits",
        gates: str = "plan",
        iterations: int = 20,
        tol: float = 1e-4,
        backward: str = "implicit",
        carry: bool = False,
        renormalise: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability, got {p!r}")
        check_positive(epsilon=epsilon)
        check_at_least_one(iterations=iterations)
        check_not_negative(sigma=sigma, tol=tol)
        check_choice(
            scores=(scores, ("logits", "softmax")),
            gates=(gates, ("plan", "softmax")),
            backward=(backward, ("implicit", "unrolled")),
        )
        self.p, self.epsilon, self.sigma, self.scores, self.gate_scores = p, epsilon, sigma, scores, gates
        self.iterations, self.tol, self.backward = iterations, tol, backward
        self.carry, self.renormalise = carry, renormalise
        self.causal_train = p == 0
        self.register_state("steps", torch.zeros((), device=self.weight.device))
        self.register_state("ot_steps", torch.zeros((), device=self.weight.device))
        if carry:
            self.register_state("prices", torch.zeros(num_experts, device=self.weight.device))
        self._step = 0
        self.transport = self._branch(0)

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if (self.route_as_in_training and self.p > 0) or (self.training and self.transport):
            return self._by_plan(logits_TE, batch)
        if not self.carry:
            indices_TK = top_k_of(logits_TE, self.top_k)
            return Choice(indices_TK, gates_of(logits_TE, indices_TK, renormalise=self.renormalise))
        prices_E = self.prices.clone()
        priced_TE = (scores_of(logits_TE, self.scores) - prices_E) / self.epsilon
        indices_TK = top_k_of(priced_TE, self.top_k)
        gate_logits_TE = priced_TE if self.gate_scores == "plan" else logits_TE
        gates_TK = gates_of(gate_logits_TE, indices_TK, renormalise=self.renormalise)
        return Choice(indices_TK, gates_TK, prices_E=prices_E)

    def _by_plan(self, logits_TE: Tensor, batch: Batch) -> Choice:
        scores_TE = scores_of(logits_TE, self.scores)
        if self.sigma:
            scores_TE = scores_TE + self.sigma * torch.randn_like(scores_TE)
        plan = sinkhorn(
            scores_TE,
            epsilon=self.epsilon,
            mask=batch.mask_T,
            tol=self.tol,
            max_iters=self.iterations,
            backward=self.backward if self.gate_scores == "plan" else "none",
            group=self.ranks.group,
        )
        log_v_E = plan.log_v.to(scores_TE.dtype)
        prices_E = -self.epsilon * (log_v_E - log_v_E.mean())
        # S_te - b_e is epsilon * log Pi_te plus a constant of the row: the same order, without underflow.
        indices_TK = top_k_of(scores_TE.detach() - prices_E, self.top_k)
        if self.gate_scores == "softmax":
            gates_TK = gates_of(logits_TE, indices_TK, renormalise=self.renormalise)
        else:
            gates_TK = plan.plan.gather(1, indices_TK)
            gates_TK = normalised(gates_TK, self.renormalise)
        self.collect(prices_E, batch)
        return Choice(indices_TK, gates_TK, prices_E=prices_E)

    def share(self, ranks: RowGroup) -> None:
        if not ranks.is_local and self.backward == "unrolled":
            raise ValueError(
                "an SSR router with backward='unrolled' cannot share a plan with other ranks: "
                "make it with backward='implicit'"
            )
        super().share(ranks)

    # ------------------------------------------------------------------ stepping

    def _branch(self, step: int) -> bool:
        """Whether step number ``step`` transports: a uniform number from (seed, step, layer), below p."""
        if self.carry and step == 0:
            return self.p > 0
        digest = hashlib.blake2b(f"{self.seed} {step} {self.layer}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.p

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        self.ot_steps += seen  # only transport steps collect
        if self.carry:
            self.prices.copy_(torch.where(seen, mean_E, self.prices))
        self._step += 1
        self.transport = self._branch(self._step)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.steps.is_meta:
            self._step = int(self.steps)
            self.transport = self._branch(self._step)
