"""Leak: how much of a token's route is decided by tokens that come after it.

Shapes: B sequences, S context, D width, T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from monge.lab.models import evaluation_mode, moe_layers
from monge.routing import Router, Routing, training_routes

PAIRS = 4  # pairs of batches that the leak is averaged over


@torch.no_grad()
def leak_of(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Share of the first halves' routes, as in training, that change when the second halves are replaced.

    Every router is asked twice about the hidden states that enter it: those of one batch, and the same with
    the second halves of another batch. Only the router can make a difference, so 0 means exactly 0. The mean
    over layers and pairs of batches; a route is a (token, expert) pair, and one that appears counts like one
    that disappears.

    Args:
        batches: (B, S) token ids each, at least two different sequences in all.
    """
    sequences = torch.cat(list(batches[: 2 * PAIRS]))
    half = len(sequences) // 2
    size = min(len(batches[0]), half)
    shares = []
    with evaluation_mode(model), training_routes(model):
        for start in range(0, half - size + 1, size):
            hidden = _router_inputs(model, sequences[start : start + size])
            others = _router_inputs(model, sequences[half + start : half + start + size])
            shares += [_changed(router, hidden[router], others[router]) for router in hidden]
    return float(torch.stack(shares).mean())


def _router_inputs(model: nn.Module, tokens_BS: Tensor) -> dict[Router, Tensor]:
    """(B, S, D) hidden states that enter each router."""
    inputs: dict[Router, Tensor] = {}
    hooks = [
        layer.router.register_forward_pre_hook(lambda router, args: inputs.update({router: args[0]}))
        for layer in moe_layers(model).values()
    ]
    try:
        model(input_ids=tokens_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _changed(router: Router, hidden_BSD: Tensor, others_BSD: Tensor) -> Tensor:
    """Share of the first halves' routes that differ once the second halves are those of `others_BSD`."""
    half = hidden_BSD.shape[1] // 2
    spliced_BSD = torch.cat([hidden_BSD[:, :half], others_BSD[:, half:]], dim=1)
    before_BSE, after_BSE = (_routes(router, hidden) for hidden in (hidden_BSD, spliced_BSD))
    before, after = before_BSE[:, :half], after_BSE[:, :half]
    return (before ^ after).sum().cpu().double() / (before.sum() + after.sum()).cpu().clamp(min=1)


def _routes(router: Router, hidden_BSD: Tensor) -> Tensor:
    """(B, S, E) bool, which experts each token takes; noise is the same at every call."""
    torch.manual_seed(0)
    routing: Routing = router(hidden_BSD)
    indices_TK = routing.indices
    # Column 0 of the E + 1 collects the empty slots (-1).
    table_TE = torch.zeros(
        len(indices_TK), routing.num_experts + 1, dtype=torch.bool, device=indices_TK.device
    )
    table_TE.scatter_(1, indices_TK + 1, True)
    return table_TE[:, 1:].unflatten(0, hidden_BSD.shape[:2])
