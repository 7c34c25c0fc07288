"""Which hidden states are padding, and which token each one is: handed down to the routers of a model.

    model.forward(input_ids, attention_mask) --> Tokens --> attention of every layer --> the layer's router

transformers hands a router nothing but hidden states. The base model's call is given one more keyword, which
travels to the attention of every decoder layer with the others and is taken out there, so no attention ever
sees it. It is an argument and no global: activation checkpointing, which runs a layer again much later,
repeats it too (hooks of the layer itself would not run again).

Shapes: B sequences, S positions, T = B S tokens, P positions in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

KEY = "monge_tokens"


class Tokens(NamedTuple):
    """What a router may know of its tokens beside their hidden states.

    Attributes:
        shape: (B, S).
        mask_BS: True where a token is valid, or None when all are or nobody said.
        ids_BS: the token ids, or None where the model was called with embeddings.
    """

    shape: tuple[int, int]
    mask_BS: Tensor | None
    ids_BS: Tensor | None


def announce(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook of the base model, whose first two arguments are input_ids and attention_mask."""
    ids_BS = kwargs.get("input_ids", args[0] if args else None)
    mask_BP = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    content = ids_BS if ids_BS is not None else kwargs.get("inputs_embeds")
    if content is None:
        return args, kwargs
    B, S = content.shape[:2]
    mask_BS = None
    if isinstance(mask_BP, Tensor) and mask_BP.dim() == 2 and mask_BP.shape[0] == B and mask_BP.shape[1] >= S:
        mask_BS = mask_BP[:, -S:].bool()  # with a cache the mask speaks of earlier positions too
    return args, {**kwargs, KEY: Tokens((B, S), mask_BS, ids_BS)}


def deliver(receivers: list[Any]) -> Callable[..., Any]:
    """A forward pre-hook of a layer's attention: the keyword becomes ``tokens`` of the ``receivers``."""

    def hook(
        attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        tokens = kwargs.get(KEY)
        for receiver in receivers:
            receiver.tokens = tokens
        return args, {name: value for name, value in kwargs.items() if name != KEY}

    return hook
