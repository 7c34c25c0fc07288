"""What transformers alone would compute with this checkpoint, and what that costs.

Shapes: B sequences, S positions, T tokens, K slots, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.hf.blocks import find_blocks
from monge.hf.router import adapters


@dataclass(frozen=True)
class StockComparison:
    """The same weights, routed by Monge and by transformers alone.

    Attributes:
        loss: mean cross-entropy of the next token in nats, routed by Monge, in evaluation mode.
        loss_stock: the same, routed by transformers alone.
        routes_changed: share of the slots of all layers whose expert transformers alone would not choose. The
            later layers see what the earlier ones did.
        kl: mean over tokens of KL(Monge || stock) of the next token, nats.
    """

    loss: float
    loss_stock: float
    routes_changed: float
    kl: float


@contextmanager
def stock_inference(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model routes as transformers alone would, after `save_pretrained`.

    Raises:
        ValueError: the model does not route by Monge.
    """
    gates = list(adapters(model))
    if not gates:
        raise ValueError(f"{type(model).__name__} does not route by monge: call monge.hf.use_router first")
    for gate in gates:
        gate.as_stock = True
    try:
        yield
    finally:
        for gate in gates:
            gate.as_stock = False


@torch.no_grad()
def compare_with_stock(model: Any, batches: Sequence[Tensor]) -> StockComparison:
    """Measure what inference without Monge would lose: loss, routes and next-token distribution.

    Args:
        model: a causal language model that routes by `monge.hf.use_router`.
        batches: (B, S) token ids each, S at least 2.

    Raises:
        ValueError: no batches, or the model does not route by Monge.

    Examples:
        >>> import torch, monge
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model = monge.hf.use_router(MixtralForCausalLM(config), "switch")
        >>> monge.hf.compare_with_stock(model, [torch.arange(24).view(2, 12)]).routes_changed
        0.0
    """
    if not batches:
        raise ValueError("batches is empty: give at least one (B, S) tensor of token ids")
    training = model.training
    model.eval()
    sums, tokens = torch.zeros(5, dtype=torch.float64), 0
    try:
        for ids_BS in batches:
            ours, routes = _run(model, ids_BS)
            with stock_inference(model):
                theirs, stock_routes = _run(model, ids_BS)
            targets = ids_BS[:, 1:].flatten()
            kl = (ours.exp() * (ours - theirs)).sum()
            kept = torch.stack([(a & b).sum() for a, b in zip(routes, stock_routes)]).sum()
            slots = torch.stack([a.sum() for a in routes]).sum()
            losses = [nnf.nll_loss(x, targets, reduction="sum").double() for x in (ours, theirs)]
            sums += torch.stack([*losses, kl.double(), (slots - kept).double(), slots.double()]).cpu()
            tokens += len(targets)
    finally:
        model.train(training)
    loss, loss_stock, kl = (sums[:3] / max(tokens, 1)).tolist()
    return StockComparison(loss, loss_stock, float(sums[3] / sums[4].clamp(min=1)), kl)


def _run(model: Any, ids_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(T, V) float32 log-probabilities of the next token, and of every layer (T, E) who takes whom."""
    routes: list[Tensor] = []
    hooks = []
    for block in find_blocks(model):
        E = block.num_experts

        def record(module: nn.Module, args: tuple[Any, ...], E: int = E) -> None:
            table = torch.zeros(len(args[1]), E, device=args[1].device)
            routes.append(
                table.scatter_add_(1, args[1], (args[2] != 0).float()) > 0
            )  # weight 0: an empty slot

        hooks.append(block.experts.register_forward_pre_hook(record))
    try:
        logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    return logits_BSV.flatten(0, 1).float().log_softmax(dim=-1), routes
