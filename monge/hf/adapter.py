"""A router of transformers that routes by a router of Monge: a subclass of the original class.

    hidden --> router (monge) --> Routing --> (logits, weights, indices), as the original returns them

The object stays the same and changes its class, so everything that holds it or hangs on it (recorders of
router logits, PEFT, optimizers, hooks) goes on. Its keys in the state dict stay those of the original too.

Shapes: T tokens, D model width, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monge.hf.families import Family, gates_are_plain, holds_prices
from monge.hf.tokens import Tokens
from monge.routing import Router

INNER = "router"
OURS = ("tokens", "family", "method", "options", "as_stock")


class RouterAdapter(nn.Module):
    """The part of the subclass that is the same for every architecture; `adapt` makes the whole.

    Attributes:
        router: the `monge.routing.Router`, whose weight is this module's.
        family: the architecture's gate.
        method, options: what `make_router` was called with.
        tokens: of the forward under way.
        as_stock: True computes what transformers alone would (`monge.hf.stock_inference`).
    """

    router: Any  # a monge.routing.Router
    weight: nn.Parameter
    family: Family
    method: str
    options: dict[str, Any]
    tokens: Tokens | None
    as_stock: bool

    @property
    def top_k(self) -> int:
        """Experts per token, the inner router's: whoever sets it here sets it there."""
        return self.router.top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.router.top_k = value

    @property
    def in_bias(self) -> bool:
        """Whether the prices live in the architecture's own bias, as -b."""
        return holds_prices(self.router, self.method, self.family)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), weights (T, K) and indices (T, K). An empty slot has weight 0 on some expert."""
        tokens, self.tokens = self.tokens, None
        if self.as_stock:
            self.write_bias()
            return super().forward(hidden)  # type: ignore[misc]
        mask = ids = None
        if tokens is not None and hidden.numel() == tokens.shape[0] * tokens.shape[1] * hidden.shape[-1]:
            hidden = hidden.reshape(*tokens.shape, hidden.shape[-1])
            mask, ids = (  # a model may be spread over devices
                x if x is None else x.to(hidden.device) for x in (tokens.mask_BS, tokens.ids_BS)
            )
        routing = self.router(hidden, mask, ids)
        weights_TK = routing.weights
        if gates_are_plain(self.router, self.method, self.family, routing.prices):
            weights_TK = self.family.gates(self, routing.logits, routing.indices)
            weights_TK = torch.where(routing.indices < 0, 0.0, weights_TK)
        # transformers knows no empty slot outside expert parallelism: they are spread over the experts
        spread = torch.arange(weights_TK.numel(), device=weights_TK.device) % routing.num_experts
        indices_TK = torch.where(routing.indices < 0, spread.view_as(routing.indices), routing.indices)
        return routing.logits, weights_TK * self.family.factor(self), indices_TK

    # ------------------------------------------------------------------ the bias, the keys, the weight

    def write_bias(self) -> None:
        """The architecture's bias becomes -b where it can hold the prices, and zero elsewhere."""
        if self.family.bias is None:
            return
        bias_E = getattr(self, self.family.bias)
        value_E = -self.router.prices if self.in_bias else torch.zeros_like(bias_E, dtype=torch.float32)
        setattr(self, self.family.bias, value_E.detach().clone())

    def read_bias(self) -> None:
        """The prices become minus the architecture's bias, where it can hold them."""
        if self.in_bias and self.family.bias is not None:
            self.router.prices.copy_(-getattr(self, self.family.bias).detach())

    def tie(self) -> None:
        """The inner router's weight is this module's."""
        self.router.weight = self.weight

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.write_bias()
        result = super().state_dict(*args, **kwargs)
        inner = (kwargs.get("prefix") or (args[1] if len(args) > 1 else "")) + f"{INNER}."
        for key in [key for key in result if key.startswith(inner)]:
            del result[key]
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.write_bias()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, value in self.router.state_dict().items():  # not in the file, and not missing there
            state_dict.setdefault(f"{prefix}{INNER}.{name}", value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.tie()
        return self


_CLASSES: dict[type[nn.Module], type[RouterAdapter]] = {}


def adapter_class(original: type[nn.Module]) -> type[RouterAdapter]:
    """The subclass of ``original`` that routes by Monge, the same on every call."""
    if original not in _CLASSES:
        name = f"Monge{original.__name__}"
        _CLASSES[original] = type(name, (RouterAdapter, original), {"original": original})
    return _CLASSES[original]


def adapt(gate: nn.Module, router: Router, family: Family, method: str, options: dict[str, Any]) -> None:
    """Let ``gate`` route by ``router`` from now on."""
    gate.__class__ = adapter_class(type(gate))
    adapted: Any = gate
    adapted.tokens, adapted.as_stock = None, False
    adapted.family, adapted.method, adapted.options = family, method, options
    adapted.router = router.train(gate.training)
    adapted.tie()
    adapted.loaded_hook = gate.register_load_state_dict_post_hook(_after_loading)
    adapted.read_bias()
    adapted.write_bias()


def restore(gate: RouterAdapter) -> None:
    """Undo `adapt`: the original class again, the bias as the prices left it."""
    gate.write_bias()
    gate.__dict__.pop("loaded_hook").remove()
    top_k = gate.router.top_k
    del gate._modules[INNER]
    for name in OURS:
        gate.__dict__.pop(name)
    gate.__class__ = type(gate).original  # type: ignore[attr-defined]
    gate.top_k = top_k


def _after_loading(gate: RouterAdapter, keys: Any) -> None:
    gate.tie()
    gate.read_bias()
