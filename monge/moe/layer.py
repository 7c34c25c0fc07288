"""The Mixture-of-Experts layer: route, dispatch, compute, combine.

    hidden states --> router --> Routing --> (capacity) --> experts --> combine --> + shared expert

Shapes: T tokens (all leading dimensions flattened), K slots per token, E experts, H model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from monge.moe.dispatch import apply_capacity, capacity_of
from monge.moe.experts import Experts, SharedExpert
from monge.routing import Router, Routing, make_router


class MoE(nn.Module):
    """A feed-forward layer of E experts of which every token takes ``top_k``.

    ``y_t = sum_k w_tk expert_{i_tk}(x_t) + shared(x_t) + bias``, with indices i and gates w from the router.

    Dropless by default. With ``capacity_factor`` cf an expert takes at most C = ceil(cf T_valid top_k / E)
    slots, those of largest gate (ties: the earlier token); a dropped slot contributes zero and the other
    gates stay as they are. Drops depend on the other tokens of the batch, whatever the router.

    Sub-modules: ``router`` (``weight`` (E, H)), ``experts`` (`Experts`: ``gate_up_proj`` (E, 2I, H),
    ``down_proj`` (E, H, I)) and, if asked for, ``shared`` (`SharedExpert`): transformers' layout, so state
    dicts interchange. Weights start as N(0, 0.02^2), biases at zero, as in transformers. Memory saved for the
    backward: see `Experts`.

    Args:
        dim: H, the width of the model.
        hidden: I, the width of an expert.
        num_experts: E.
        top_k: experts per token.
        router: a name in `monge.routing.ROUTERS`, or a router.
        router_options: keyword arguments of `monge.make_router` (``layer``, ``seed`` and the method's own).
        activation: "swiglu" (SiLU gate), "geglu" (tanh-GELU gate), "geglu_exact", or without a gate "gelu"
            (exact), "gelu_tanh" or "relu".
        shared_hidden: S, the width of the shared expert; 0 for none.
        bias: a bias of every expert's input projection, the shared one's too, and one of the output, (H,),
            which is added once to every valid token, whatever its experts and gates.
        capacity_factor: None (dropless) or cf > 0.
        compute: "auto", "loop", "sorted", "gemv", "grouped_mm" or "masked": equal results, different speed.
        device: of the weights.
        dtype: of the weights; the state of the router stays float32.

    Raises:
        ValueError: a size, name or factor is out of range, or the router does not fit the layer.

    Source: arXiv 1701.06538 (sparse experts), arXiv 2211.15841 (dropless), arXiv 2006.16668 (capacity).

    Examples:
        >>> import torch
        >>> from monge import MoE
        >>> layer = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
        >>> layer(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
        >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
        {'router.weight': (4, 8), 'experts.gate_up_proj': (4, 32, 8), 'experts.down_proj': (4, 8, 16)}
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        router: str | Router = "prices",
        router_options: Mapping[str, Any] | None = None,
        activation: str = "swiglu",
        shared_hidden: int = 0,
        capacity_factor: float | None = None,
        compute: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if shared_hidden < 0:
            raise ValueError(f"shared_hidden must be 0 (no shared expert) or positive, got {shared_hidden}")
        if capacity_factor is not None and not 0 < capacity_factor < float("inf"):
            raise ValueError(
                f"capacity_factor must be None (dropless) or a positive number, got {capacity_factor}"
            )
        self.dim, self.top_k, self.num_experts = dim, top_k, num_experts
        self.capacity_factor = capacity_factor
        if isinstance(router, Router):
            self.router = self._check_router(router, router_options)
        else:
            options = {"device": device, "dtype": dtype, **(router_options or {})}
            self.router = make_router(router, dim=dim, num_experts=num_experts, top_k=top_k, **options)
        common: dict[str, Any] = {"activation": activation, "bias": bias, "device": device, "dtype": dtype}
        self.experts = Experts(dim, hidden, num_experts, compute=compute, **common)
        self.shared = SharedExpert(dim, shared_hidden, **common) if shared_hidden else None
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def _check_router(self, router: Router, options: Mapping[str, Any] | None) -> Router:
        if options:
            raise ValueError(
                f"router_options {dict(options)} need a router's name; a router was given, set them there"
            )
        theirs = (router.dim, router.num_experts, router.top_k)
        ours = (self.dim, self.num_experts, self.top_k)
        if theirs != ours:
            raise ValueError(
                f"the router has (dim, num_experts, top_k) = {theirs}, the layer {ours}: make them equal"
            )
        return router

    def forward(self, hidden: Tensor, mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            hidden: (..., H). With three or more dimensions the next-to-last is the sequence.
            mask: (...), True where a token is valid. The others take no expert, give zero output and no
                gradient.
            token_ids: (...), integer ids of the tokens, for the routers that use them (hash).

        Returns:
            (..., H), in the dtype of ``hidden`` (of autocast inside it).
        """
        shape = hidden.shape
        if hidden.dim() < 1 or shape[-1] != self.dim:
            raise ValueError(f"hidden must be (..., dim={self.dim}), got shape {tuple(shape)}")
        if hidden.dim() == 1:
            hidden = hidden[None]
        if mask is not None:
            # padding may hold NaN: zeros keep it out of the output and of the weights' gradient
            mask = self._check_mask(mask, hidden)
            hidden = hidden.masked_fill(~mask[..., None], 0)
        routing = self.router(hidden, mask, token_ids)
        if self.capacity_factor is not None:
            routing = apply_capacity(routing, self._capacity(routing))
        hidden_TH = hidden.reshape(-1, self.dim)
        out_TH = self.experts(hidden_TH, routing.indices, routing.weights)
        if self.shared is not None:
            out_TH = out_TH + self.shared(hidden_TH)
        if self.bias is not None:
            out_TH = out_TH + self.bias.to(out_TH.dtype)
            if mask is not None:  # with biases a hidden state of zero has an output
                out_TH = out_TH.masked_fill(~mask.reshape(-1, 1), 0)
        return out_TH.reshape(shape)

    def _check_mask(self, mask: Tensor, hidden: Tensor) -> Tensor:
        lead = hidden.shape[:-1]
        if mask.numel() != lead.numel() or mask.dim() > len(lead):
            raise ValueError(
                f"mask must be {tuple(lead)}, as hidden is {tuple(hidden.shape)}; got {tuple(mask.shape)}"
            )
        return mask.reshape(lead).bool()

    def _capacity(self, routing: Routing) -> Tensor | int:
        assert self.capacity_factor is not None
        num_valid = routing.indices.shape[0] if routing.mask is None else routing.mask.sum()
        return capacity_of(num_valid * self.top_k, self.num_experts, self.capacity_factor)

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}" if self.capacity_factor is not None else ""
