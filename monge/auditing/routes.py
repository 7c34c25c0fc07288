"""Recording every route of a model, whatever its routers: hooks on the experts, which all are called alike.

Shapes: T tokens, B sequences of S tokens, K slots, E experts, H model width, N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.hf.blocks import SparseBlock, find_blocks
from monge.routing import Routing


@dataclass
class Routes:
    """What the last forward did, a list entry per mixture layer.

    Attributes:
        tables: (T, E) bool, whether each token took each expert.
        hidden: (T, H), what the experts were given.
        entropies: scalar, entropy of softmax(logits) summed over tokens; absent where no logits were seen.
    """

    tables: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    entropies: dict[int, Tensor] = field(default_factory=dict)


def mixture_layers(model: nn.Module) -> list[SparseBlock]:
    """The mixture layers of ``model``.

    Raises:
        ValueError: there are none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no mixture layers: an audit is of a Mixture of Experts; see "
            "monge.convert and monge.hf.upcycle for dense models"
        )
    return blocks


@contextmanager
def recorded(blocks: list[SparseBlock]) -> Iterator[Routes]:
    """Record the routes of every forward meanwhile; a new forward replaces what the last one left."""
    routes = Routes()
    hooks = []
    for index, block in enumerate(blocks):
        hooks.append(block.experts.register_forward_pre_hook(_recorder(routes, index, block.num_experts)))
        hooks.append(block.router.register_forward_hook(_entropy_recorder(routes, index)))
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run(model: Any, ids_BS: Tensor) -> tuple[Tensor, int]:
    """Sum of the next-token losses (float64, nats), and their number."""
    torch.manual_seed(0)  # routers that draw noise draw the same in both of two runs that are compared
    logits_BSV = model(input_ids=ids_BS).logits[:, :-1]
    losses = nnf.cross_entropy(logits_BSV.flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="none")
    return losses.double().sum().cpu(), losses.numel()


def routes_of(model: Any, blocks: list[SparseBlock], ids_BS: Tensor) -> list[Tensor]:
    """(B, S, E) bool of every mixture layer, in one forward."""
    with recorded(blocks) as routes:
        run(model, ids_BS)
    return [routes.tables[index].unflatten(0, ids_BS.shape) for index in range(len(blocks))]


def changed(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Slots of ``before`` that ``after`` lacks or has too many, halved, and the mean number of slots."""
    different = (before ^ after).sum()
    return float(different) / 2, float(before.sum() + after.sum()) / 2


@torch.no_grad()
def outputs_of_all(experts: nn.Module, hidden_NH: Tensor, num_experts: int) -> Tensor:
    """(E, N, H): what every expert makes of the same hidden states."""
    N = len(hidden_NH)
    at_once = max(1, 4096 // max(N, 1))
    outputs = []
    for first in range(0, num_experts, at_once):
        chosen = torch.arange(first, min(first + at_once, num_experts), device=hidden_NH.device)
        indices_T1 = chosen.repeat_interleave(N)[:, None]
        ones_T1 = torch.ones(len(indices_T1), 1, device=hidden_NH.device)
        out_TH = experts(hidden_NH.repeat(len(chosen), 1), indices_T1, ones_T1)
        outputs.append(out_TH.unflatten(0, (len(chosen), N)))
    return torch.cat(outputs)


def _recorder(routes: Routes, index: int, num_experts: int) -> Callable[..., None]:
    def record(experts: nn.Module, args: tuple[Any, ...]) -> None:
        hidden_TH, indices_TK, weights_TK = args[:3]
        filled_TK = (indices_TK >= 0) & (indices_TK < num_experts) & (weights_TK != 0)  # else an empty slot
        # Column E collects the empty slots.
        table_TE = torch.zeros(
            len(indices_TK), num_experts + 1, dtype=torch.bool, device=indices_TK.device
        ).scatter_(1, torch.where(filled_TK, indices_TK, num_experts), True)
        routes.tables[index] = table_TE[:, :num_experts]
        routes.hidden[index] = hidden_TH.detach()

    return record


def _entropy_recorder(routes: Routes, index: int) -> Callable[..., None]:
    def record(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = output.logits if isinstance(output, Routing) else output
        logits = logits[0] if isinstance(logits, tuple) else logits
        if isinstance(logits, Tensor) and logits.is_floating_point():
            probs = logits.detach().float().softmax(dim=-1)
            routes.entropies[index] = torch.special.entr(probs).sum().double().cpu()

    return record
