"""Routers: hidden states in, ``Routing`` out. One method a file; this is the table of their names.

Which one to choose: ``prices`` (balanced, causal, no auxiliary loss) unless you compare; ``topk`` and
``switch`` are the usual baselines, ``lossfree`` and ``quantile`` the relatives of ``prices``, ``ssr`` and
``maxscore`` the papers this library is about. Every router with ``needs_step`` wants ``monge.step(model)``
after each optimizer step.
"""

from __future__ import annotations

import inspect
from typing import Any

from monge.routing.base import Base
from monge.routing.expert_choice import ExpertChoice
from monge.routing.hash import Hash
from monge.routing.losses import load_balance_loss, z_loss
from monge.routing.lossfree import LossFree
from monge.routing.maxscore import MaxScore
from monge.routing.noisy_topk import NoisyTopK
from monge.routing.prices import Prices
from monge.routing.quantile import Quantile
from monge.routing.router import Choice, Router
from monge.routing.sbase import SBase
from monge.routing.sigmoid import Sigmoid
from monge.routing.ssr import SSR
from monge.routing.stepping import aux_loss, step, training_routes, use_group
from monge.routing.switch import Switch
from monge.routing.topk import TopK
from monge.routing.types import Routing

ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "switch": Switch,
    "noisy_topk": NoisyTopK,
    "sigmoid": Sigmoid,
    "lossfree": LossFree,
    "quantile": Quantile,
    "base": Base,
    "sbase": SBase,
    "expert_choice": ExpertChoice,
    "hash": Hash,
    "ssr": SSR,
    "maxscore": MaxScore,
    "prices": Prices,
}

__all__ = [
    "ROUTERS",
    "Choice",
    "Router",
    "Routing",
    "aux_loss",
    "load_balance_loss",
    "make_router",
    "router_options",
    "step",
    "training_routes",
    "use_group",
    "z_loss",
]


def make_router(
    name: str, *, dim: int, num_experts: int, top_k: int, layer: int = 0, seed: int = 0, **options: Any
) -> Router:
    """The router called ``name`` in ``ROUTERS``.

    Args:
        name: one of ``ROUTERS``.
        dim: width of the hidden states.
        num_experts: E.
        top_k: experts per token.
        layer: number of the layer.
        seed: of the decisions that all ranks share.
        options: the method's own (see its class) and those of every router: ``bias``, ``z_loss``, ``device``,
            ``dtype``.

    Raises:
        ValueError: an unknown name or option; the message lists the valid ones.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("topk", dim=8, num_experts=4, top_k=2)
        >>> router(torch.randn(3, 5, 8)).indices.shape  # leading dimensions are flattened
        torch.Size([15, 2])
    """
    if name not in ROUTERS:
        raise ValueError(f"there is no router {name!r}; the routers are {', '.join(ROUTERS)}")
    unknown = sorted(set(options) - set(router_options(name)))
    if unknown:
        raise ValueError(
            f"router {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(router_options(name))}"
        )
    return ROUTERS[name](dim, num_experts, top_k, layer=layer, seed=seed, **options)


def router_options(name: str) -> list[str]:
    """Names of the options of the router called ``name``, its own first."""
    options: dict[str, None] = {}
    for cls in ROUTERS[name].__mro__:
        if issubclass(cls, Router) and "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            options |= {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    return [option for option in options if option not in ("layer", "seed")]
