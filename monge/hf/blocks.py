"""The mixture layers of a model, found by structure: Monge's own and those of transformers alike.

    block.router (or block.gate) --> indices, gates --> block.experts(hidden, indices, gates)

Both stack the weights of the experts below ``experts``, which are called with the routes as arguments: one
hook there sees every route and may change it, whatever the model.

Shapes: T tokens, K slots per token, E experts, I expert width, H model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SparseBlock:
    """A mixture layer: ``router`` chooses ``top_k`` of ``num_experts``, ``experts`` holds their weights.

    ``name`` is the path of ``block`` in the model, ``layer`` the first number in it. ``beside`` is a shared
    expert that the model keeps next to the block and adds to its output (GraniteMoeShared), or None.
    """

    name: str
    layer: int
    block: nn.Module
    router: Any
    experts: nn.Module
    beside: nn.Module | None

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return int(self.router.top_k)

    @property
    def num_experts(self) -> int:
        """E, routed experts."""
        return _stacked(self.experts).shape[0]

    @property
    def renormalises(self) -> bool:
        """Whether the gates of a token have the same sum whatever the number of experts it takes."""
        flag = getattr(self.router, "renormalise", getattr(self.router, "norm_topk_prob", True))
        return self.top_k > 1 if flag is None else bool(flag)


def find_blocks(model: nn.Module) -> list[SparseBlock]:
    """The mixture layers of ``model`` in the order of its modules; a dense model has none."""
    blocks = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module) or getattr(experts, "down_proj", None) is None:
            continue
        routers = [getattr(module, child, None) for child in ("router", "gate")]
        router = next((r for r in routers if isinstance(r, nn.Module) and hasattr(r, "top_k")), None)
        if router is not None:
            parent = model.get_submodule(name.rpartition(".")[0])
            beside = getattr(parent, "shared_mlp", None) if parent is not module else None
            blocks.append(SparseBlock(name, layer_in(name), module, router, experts, beside))
    return blocks


def layer_in(name: str) -> int:
    """The first number in the path of a module, 0 if there is none.

    Examples:
        >>> from monge.hf.blocks import layer_in
        >>> layer_in("model.layers.7.mlp")
        7
    """
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else 0


@contextmanager
def shifted_top_k(model: nn.Module, offset: int) -> Iterator[None]:
    """Every mixture layer takes ``top_k + offset`` experts meanwhile, with the weight each has with top_k.

    Gates that sum to one would shrink to k / (k + offset) of themselves: they are multiplied by
    (k + offset) / k, so that the chosen experts of a conversion, with k folded into their ``down_proj``, are
    still summed with weight about one. Gates that are not renormalised stay.

    Raises:
        ValueError: the model has no mixture layer, or fewer than 1 or more than E experts would be taken.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no mixture layers whose top_k could be shifted")
    for block in blocks:
        if not 1 <= block.top_k + offset <= block.num_experts:
            raise ValueError(
                f"{block.name} takes {block.top_k} of {block.num_experts} experts: offset={offset} is out of "
                "range"
            )
    before = [block.top_k for block in blocks]
    hooks = [_rescale(block, offset) for block in blocks if block.renormalises and offset]
    try:
        for block, top_k in zip(blocks, before):
            block.router.top_k = top_k + offset
        yield
    finally:
        for block, top_k in zip(blocks, before):
            block.router.top_k = top_k
        for hook in hooks:
            hook.remove()


def possible_offsets(model: nn.Module, offsets: tuple[int, ...]) -> tuple[int, ...]:
    """Those of ``offsets`` that every mixture layer allows; a dense model allows 0 alone."""
    sizes = [(block.top_k, block.num_experts) for block in find_blocks(model)]
    return tuple(o for o in offsets if o == 0 or (sizes and all(1 <= k + o <= E for k, E in sizes)))


@contextmanager
def counted_loads(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Layer -> (E,) int64, the slots that each expert has filled since the context was entered."""
    loads: dict[int, Tensor] = {}
    hooks = [b.experts.register_forward_pre_hook(_counter(loads, b)) for b in find_blocks(model)]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


def _rescale(block: SparseBlock, offset: int) -> Any:
    factor = (block.top_k + offset) / block.top_k

    def larger_gates(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_TH, indices_TK, gates_TK, *rest = arguments
        return (hidden_TH, indices_TK, gates_TK * factor, *rest)

    return block.experts.register_forward_pre_hook(larger_gates)


def _counter(loads: dict[int, Tensor], block: SparseBlock) -> Any:
    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        indices_S = arguments[1].detach().flatten()
        valid_S = (indices_S >= 0) & (arguments[2].detach().flatten() != 0)  # an empty slot: -1, or weight 0
        new_E = torch.bincount(indices_S[valid_S], minlength=block.num_experts)
        loads[block.layer] = loads[block.layer] + new_E if block.layer in loads else new_E

    return count


def _stacked(experts: nn.Module) -> Tensor:
    weight = experts.get_parameter("down_proj")
    if weight.dim() != 3:
        raise ValueError(
            f"down_proj of {type(experts).__name__} must be stacked (E, H, I), got {weight.shape}"
        )
    return weight
