"""The base class of every router: hidden states in, ``Routing`` out; a method overrides ``choose`` alone.

Shapes: T tokens (all leading dimensions flattened), D model width, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.ot.distributed import LOCAL, RowGroup
from monge.routing.checks import check_at_least_one, check_not_negative
from monge.routing.losses import z_loss as z_loss_of
from monge.routing.types import Routing


class Batch(NamedTuple):
    """What a method may look at beside the logits.

    Attributes:
        hidden_TD: the hidden states; zero where masked.
        mask_T: True where a token is valid, or None when all are.
        sequences: (B, L), number and length of the sequences, T = B * L; L is the next-to-last dimension of
            ``hidden``.
        token_ids_T: the ids of the tokens where the caller gave them, else None.
    """

    hidden_TD: Tensor
    mask_T: Tensor | None
    sequences: tuple[int, int]
    token_ids_T: Tensor | None

    def num_valid(self) -> Tensor:
        """Scalar float32, the number of valid tokens (no synchronisation with the device)."""
        if self.mask_T is None:
            return torch.full((), float(len(self.hidden_TD)), device=self.hidden_TD.device)
        return self.mask_T.sum(dtype=torch.float32)


class Choice(NamedTuple):
    """What a method decides; masked tokens need no attention here, ``Router.forward`` empties their slots."""

    indices_TK: Tensor
    weights_TK: Tensor
    aux_loss: Tensor | None = None
    prices_E: Tensor | None = None


class Router(nn.Module):
    """Routes tokens to experts. The logits are ``Z = hidden @ weight.T (+ bias)``, in float32 at least.

    Autocast is switched off inside, so choices and gates do not depend on it. A masked token fills no slot,
    takes part in no statistic and gives no gradient, even if its hidden state is NaN. Auxiliary losses belong
    to training mode; the last one is kept in ``last_aux_loss`` for ``monge.aux_loss``.

    Args:
        dim: D, the width of the hidden states.
        num_experts: E.
        top_k: experts per token, between 1 and E.
        layer: number of the layer: it names the router in messages and separates the random decisions of
            layers.
        seed: seed of decisions that all ranks must share (not of the initialisation: that is torch's).
        bias: add a learnable bias per expert to the logits.
        z_loss: coefficient of the router z-loss (arXiv 2202.08906, eq. 5); 0 switches it off.
        device, dtype: of the weight; persistent state is float32 and stays so under ``.to(dtype)``.

    Raises:
        TypeError: ``hidden``, ``mask`` or ``token_ids`` have the wrong type.
        ValueError: a size is out of range, a shape does not fit, or logits are NaN or infinite. The last is
            noticed in eager mode on the CPU only: on an accelerator every forward would wait for the device.

    Example (a router of one's own; `monge.MoE` takes it in place of a name):
        >>> import torch
        >>> from monge.routing import Choice, Router
        >>> class Nearest(Router):
        ...     def choose(self, logits_TE, batch):
        ...         best = logits_TE.topk(self.top_k)
        ...         return Choice(best.indices, best.values.softmax(dim=1))
        >>> Nearest(dim=8, num_experts=4, top_k=2)(torch.randn(3, 8)).indices.shape
        torch.Size([3, 2])
    """

    causal_train: bool = True
    causal_eval: bool = True
    """Whether the experts of a token depend on that token alone, in training and in evaluation mode."""

    needs_step: bool = False
    """Whether the method is incomplete without ``monge.step`` after every optimizer step."""

    last_aux_loss: Tensor | None
    """Of the last forward, coefficient included."""

    ranks: RowGroup = LOCAL
    """The ranks that are routed as one batch, set by ``monge.routing.use_group``."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        layer: int = 0,
        seed: int = 0,
        bias: bool = False,
        z_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one(dim=dim, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise ValueError(
                f"top_k={top_k} experts per token need at least as many experts, got "
                f"num_experts={num_experts}; lower top_k or add experts"
            )
        check_not_negative(z_loss=z_loss)
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.layer, self.seed, self.z_loss = layer, seed, z_loss
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.last_aux_loss = None
        self.route_as_in_training = False  # set by `monge.routing.training_routes`
        self._state_names: list[str] = []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution of standard deviation 0.02; the bias starts at zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # ------------------------------------------------------------------ what a method overrides

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        """The experts and gates of every token."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(logits_TE, batch)")

    @property
    def training_route(self) -> bool:
        """Whether tokens take the routes that the method takes in training."""
        return self.training or self.route_as_in_training

    def share(self, ranks: RowGroup) -> None:
        """Route as one batch with ``ranks``; a method that cannot raises ValueError."""
        self.ranks = ranks

    # ------------------------------------------------------------------ forward

    def forward(self, hidden: Tensor, mask: Tensor | None = None, token_ids: Tensor | None = None) -> Routing:
        """Route ``hidden`` (..., D).

        Args:
            hidden: (..., D), floating point. With three or more dimensions the next-to-last is the sequence.
            mask: (...) or (T,), True (or non-zero) where a token is valid; None when all are.
            token_ids: (...) or (T,) integer ids of the tokens; only the hash router looks at them.
        """
        batch = self._flatten(hidden, mask, token_ids)
        with full_precision(hidden.device):
            logits_TE = self._logits(batch.hidden_TD)
            choice = self.choose(logits_TE, batch)
            indices_TK, weights_TK, aux_loss, prices_E = choice
            if self.z_loss and self.training:
                penalty = self.z_loss * z_loss_of(logits_TE, mask=batch.mask_T, group=self.ranks.group)
                aux_loss = penalty if aux_loss is None else aux_loss + penalty
            if batch.mask_T is not None:
                indices_TK = torch.where(batch.mask_T[:, None], indices_TK, -1)
                weights_TK = torch.where(batch.mask_T[:, None], weights_TK, 0.0)
        if not recomputing():
            self.last_aux_loss = aux_loss
        return Routing(indices_TK, weights_TK, self.num_experts, logits_TE, aux_loss, prices_E, batch.mask_T)

    def _flatten(self, hidden: Tensor, mask: Tensor | None, token_ids: Tensor | None) -> Batch:
        if not hidden.is_floating_point():
            raise TypeError(f"{self._title()}: hidden must be floating point, got {hidden.dtype}")
        if hidden.dim() < 1 or hidden.shape[-1] != self.dim:
            raise ValueError(
                f"{self._title()}: hidden must be (..., dim={self.dim}), got shape {tuple(hidden.shape)}"
            )
        lead = hidden.shape[:-1]
        num_tokens = lead.numel()
        flat = {"mask": mask, "token_ids": token_ids}
        for name, value in flat.items():
            if value is None:
                continue
            if value.shape != lead and value.shape != (num_tokens,):
                raise ValueError(
                    f"{self._title()}: {name} must be {tuple(lead)} or ({num_tokens},) for hidden of shape "
                    f"{tuple(hidden.shape)}, got {tuple(value.shape)}"
                )
            if value.is_floating_point() or value.is_complex():
                raise TypeError(f"{self._title()}: {name} must be bool or integer, got {value.dtype}")
            flat[name] = value.reshape(num_tokens)
        hidden_TD, mask_T = hidden.reshape(num_tokens, self.dim), flat["mask"]
        if mask_T is not None:
            mask_T = mask_T.bool()
            # Not a product: NaN in padding must not reach the gradient of the weight.
            hidden_TD = torch.where(mask_T[:, None], hidden_TD, 0.0)
        length = lead[-1] if lead else 1
        return Batch(hidden_TD, mask_T, (num_tokens // max(length, 1), length), flat["token_ids"])

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(hidden_TD.dtype, self.weight.dtype), torch.float32)
        bias_E = None if self.bias is None else self.bias.to(dtype)
        logits_TE = F.linear(hidden_TD.to(dtype), self.weight.to(dtype), bias_E)
        if logits_TE.device.type == "cpu" and not torch.compiler.is_compiling():
            finite_TE = torch.isfinite(logits_TE.detach())
            if not finite_TE.all():
                row = int((~finite_TE).any(dim=1).nonzero()[0])
                raise ValueError(
                    f"{self._title()}: {int((~finite_TE).sum())} of {finite_TE.numel()} logits are NaN or "
                    f"infinite, the first in token {row}; the hidden states or the weight overflowed. Lower "
                    "the learning rate, clip the gradients, or use bfloat16 in place of float16; exclude "
                    "padding with mask="
                )
        return logits_TE

    def _title(self) -> str:
        # For messages alone: a forward that reads the layer's number would be compiled anew for every layer.
        return f"{type(self).__name__} router of layer {self.layer}"

    # ------------------------------------------------------------------ state

    def register_state(self, name: str, value: Tensor) -> None:
        """Register a float32 buffer that is saved, and that keeps its values under ``.to(dtype)``."""
        self.register_buffer(name, value.to(torch.float32))
        self._state_names.append(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self._state_names}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                # From the meta device (`to_empty`) there are no values to keep.
                setattr(self, name, moved.float() if value.is_meta else value.to(moved.device))
        self.last_aux_loss = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self._state_names:  # load_state_dict(assign=True) takes the dtype of the file
            setattr(self, name, getattr(self, name).float())

    def __getstate__(self) -> dict[str, Any]:
        # The auxiliary loss hangs on the graph of the last forward, which can be neither copied nor saved.
        return {**self.__dict__, "last_aux_loss": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, layer={self.layer}"


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast."""
    return torch.autocast(device_type=device.type, enabled=False)


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, that is, activation checkpointing repeats it.

    Always False while ``torch.compile`` traces; the operator ``accumulate`` of ``monge.routing.stepped`` asks
    when it runs.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
