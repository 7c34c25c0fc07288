"""How the router of a converted layer learns: a sigmoid straight-through estimator for the time of training.

The deployed gates g of the k chosen experts hardly depend on the logits z (`monge.conversion.building`: they
are functions of eps z, eps = 2^-4 to 2^-40), so their own gradient teaches the router nothing. While it
trains, the gate of every expert is

    g + (s - sg(s)) / k,    s = sigmoid(2 (w sg(x) - threshold)),    threshold = (z_(k) + z_(k+1)) / 2

with g = 0 where it was not chosen, sg the gradient's stop, z = w x and z_(k) the k-th largest logit. The
value is g to the last bit; the slope says what the loss would do if the expert were more, or less, likely to
be chosen. The factor k is folded into the experts' weights, so that s stands beside a gate k g of about 1.

The estimate is biased: an expert that is off always looks useful, one that is on has found its scale. A
router lives with that, the layers below do not: were x to get a gradient from it, the model would fall apart
at any learning rate.

Shapes: T tokens, E experts, K slots per token, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from monge.conversion.all_experts import AllExperts
from monge.conversion.building import GATE_SCALES
from monge.moe import MoE
from monge.moe.experts import Experts
from monge.routing.router import Batch, Choice, Router
from monge.routing.sigmoid import Sigmoid
from monge.routing.topk import TopK

SLOPE = 2.0  # of the sigmoid, at logits of standard deviation 1


class StraightThrough(Router):
    """A converted layer's ``router`` while it is trained: its routes and gates bit by bit, for all experts.

    Its ``weight`` is that of z, ``router.weight / scale``, so that the optimizer moves z as it moves other
    things. ``scale`` is a power of two, so nothing is rounded on the way there and back.

    Args:
        router: the router of the layer.
        scale: eps.

    Source: arXiv 1308.3432 (straight-through estimator).
    """

    def __init__(self, router: TopK | Sigmoid, scale: float) -> None:
        super().__init__(
            router.dim,
            router.num_experts,
            router.top_k,
            layer=router.layer,
            bias=router.bias is not None,
            device=router.weight.device,
            dtype=router.weight.dtype,
        )
        self._deployed = (router,)  # in a tuple, so that its weight is no parameter here
        self.scale = scale
        _copy(router, self, 1 / scale)

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        (router,), k = self._deployed, self.top_k
        chosen_TK, gates_TK, *_ = router.choose(logits_TE * self.scale, batch)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, chosen_TK, gates_TK)
        if k < self.num_experts:
            with torch.no_grad():
                rest_TE = logits_TE.scatter(1, chosen_TK, -torch.inf)
                threshold_T = (logits_TE.gather(1, chosen_TK[:, -1:])[:, 0] + rest_TE.amax(dim=1)) / 2
            z_TE = nn.functional.linear(batch.hidden_TD.detach().to(logits_TE), self.weight, self.bias)
            s_TE = torch.sigmoid(SLOPE * (z_TE - threshold_T[:, None]))
            weights_TE = weights_TE + (s_TE - s_TE.detach()) / k
        all_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        return Choice(all_TE, weights_TE)


@contextmanager
def straight_through(model: nn.Module, gates: str) -> Iterator[list[StraightThrough]]:
    """Within the context the converted layers of ``model`` train: `StraightThrough` routers, `AllExperts`.

    Afterwards, also after an exception, they have their own modules again, with what was learned.

    Args:
        gates: "standard" or "binary", as the model was converted; sigmoid routers are known by their class.

    Raises:
        ValueError: a layer has another router than those of conversions.
    """
    replaced: list[tuple[MoE, Router, Experts]] = []
    try:
        for layer in [module for module in model.modules() if isinstance(module, MoE)]:
            router = layer.router
            if not isinstance(router, TopK | Sigmoid):
                raise ValueError(
                    f"a converted layer routes by top-k or sigmoid, this one by {type(router).__name__}: "
                    "train it with its own router"
                )
            trained = StraightThrough(
                router, GATE_SCALES["sigmoid" if isinstance(router, Sigmoid) else gates]
            )
            replaced.append((layer, router, layer.experts))
            layer.register_module("router", trained)
            layer.register_module("experts", AllExperts(layer.experts))
        yield [layer.router for layer, _, _ in replaced if isinstance(layer.router, StraightThrough)]
    finally:
        for layer, router, experts in replaced:
            if isinstance(layer.router, StraightThrough):
                _copy(layer.router, router, layer.router.scale)
            layer.register_module("router", router)
            layer.register_module("experts", experts)


@torch.no_grad()
def _copy(source: Router, target: Router, factor: float) -> None:
    target.weight.copy_(source.weight * factor)
    if source.bias is not None and target.bias is not None:
        target.bias.copy_(source.bias * factor)
