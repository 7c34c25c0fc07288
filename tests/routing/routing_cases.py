"""The routers under test, every method and every option that changes a route or a gate, and small helpers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monge.routing import Router, Routing, make_router

D, E, K = 8, 6, 2

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "topk_softmax_gates": ("topk", {"renormalise": False, "bias": True, "z_loss": 0.1}),
    "switch": ("switch", {}),
    "switch_sequence": ("switch", {"scope": "sequence"}),
    "switch_global": ("switch", {"scope": "global"}),
    "noisy_topk": ("noisy_topk", {}),
    "sigmoid": ("sigmoid", {}),
    "lossfree": ("lossfree", {}),
    "lossfree_softmax": ("lossfree", {"scores": "softmax"}),
    "quantile": ("quantile", {}),
    "base": ("base", {}),
    "sbase": ("sbase", {}),
    "expert_choice": ("expert_choice", {}),
    "expert_choice_batch": ("expert_choice", {"per_token_eval": False}),
    "hash": ("hash", {}),
    "ssr_rare": ("ssr", {"p": 0.0}),
    "ssr": ("ssr", {"p": 1.0}),
    "ssr_carry": ("ssr", {"p": 1.0, "carry": True}),
    "ssr_softmax_gates": ("ssr", {"p": 1.0, "gates": "softmax", "carry": True}),
    "ssr_noise": ("ssr", {"p": 1.0, "sigma": 0.5, "scores": "softmax", "epsilon": 0.05}),
    "maxscore": ("maxscore", {}),
    "maxscore_prices": ("maxscore", {"eval_prices": True, "scores": "logits"}),
    "maxscore_sequence": ("maxscore", {"per": "sequence", "coefficient": 0.01}),
    "maxscore_soft_topk": ("maxscore", {"gates": "soft_topk"}),
    "maxscore_annealed": ("maxscore", {"gates": "annealed", "method": "approximate"}),
    "prices": ("prices", {}),
    "prices_raw": ("prices", {"gates": "raw"}),
}
NOISY = {"noisy_topk", "ssr_noise"}  # routes depend on torch's generator
BATCH = {
    name for name, (method, _) in CASES.items() if method in ("base", "sbase", "expert_choice", "maxscore")
}
BATCH |= {"ssr", "ssr_carry", "ssr_softmax_gates", "ssr_noise"}


def build(
    case: str, *, dim: int = D, num_experts: int = E, top_k: int = K, spread: float = 3.0, **more: Any
) -> Router:
    """The router of a case, in training mode, its weight large enough that tokens differ."""
    name, options = CASES[case]
    router = make_router(name, dim=dim, num_experts=num_experts, top_k=top_k, **(options | more))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, dim, generator=generator) * spread / dim**0.5)
    return router


def hidden_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """The least that consumes a routing: every expert adds a learned scale of the token, times its gate."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        generator = torch.Generator().manual_seed(11)
        self.experts = nn.Parameter(torch.randn(router.num_experts, router.dim, generator=generator))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        routing = self.router(hidden, mask)
        scales = self.experts[routing.indices.clamp(min=0)]
        mixed = (routing.weights[..., None] * scales).sum(1).reshape(hidden.shape)
        return hidden + mixed * hidden


def backward(loss: Tensor) -> None:
    """Backward, unless nothing is learned: the hash router."""
    if loss.requires_grad:
        loss.backward()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def check_routing(routing: Routing, router: Router, T: int, mask: Tensor | None = None) -> None:
    """What holds for every routing of every router."""
    indices, weights = routing.indices, routing.weights
    slots = router.num_experts if type(router).__name__ == "ExpertChoice" else router.top_k
    assert indices.shape == weights.shape == (T, slots)
    assert indices.dtype == torch.int64
    assert torch.finfo(weights.dtype).bits >= 32
    assert routing.logits.shape == (T, router.num_experts)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(routing.logits).all()
    assert (weights >= 0).all()
    assert (weights[indices < 0] == 0).all()
    assert int(indices.max()) < router.num_experts if T else True
    valid = torch.ones(T, dtype=torch.bool) if mask is None else mask.flatten().bool()
    assert (indices[~valid] == -1).all()
    for row in indices[valid].tolist():
        filled = [e for e in row if e >= 0]
        assert len(set(filled)) == len(filled)
        assert len(filled) == router.top_k or type(router).__name__ == "ExpertChoice"


def same_routes(a: Routing, b: Routing) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)
