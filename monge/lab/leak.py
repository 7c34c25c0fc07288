"""Leak: how much of a token's route, and of the model's output, is decided by tokens it should not see.

Of a language model those are the later tokens of the sequence; of an image classifier the other images of the
batch. Either way a batch is cut in two along one dimension, and the second half replaced.

Shapes: B sequences or images, S tokens of each, D width, T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.lab.models import evaluation_mode, moe_layers
from monge.routing import Router, Routing, training_routes

PAIRS = 4  # pairs of batches that the leak is averaged over


@torch.no_grad()
def leak_of(model: nn.Module, batches: Sequence[Tensor], *, halved: int = 1) -> float:
    """Share of the first halves' routes, as in training, that change when the second halves are replaced.

    Every router is asked twice about the hidden states that enter it: those of one batch, and the same with
    the second halves of another batch. Only the router can make a difference, so 0 means exactly 0. The mean
    over layers and pairs of batches; a route is a (token, expert) pair, and one that appears counts like one
    that disappears.

    Args:
        batches: inputs of the model, at least two different examples in all.
        halved: 1 to halve sequences, 0 to halve the batch.
    """
    shares = []
    with evaluation_mode(model), training_routes(model):
        for first, second in _pairs(batches):
            hidden, others = _router_inputs(model, first), _router_inputs(model, second)
            shares += [_changed(router, hidden[router], others[router], halved) for router in hidden]
    return float(torch.stack(shares).mean())


@torch.no_grad()
def leak_kl_of(model: nn.Module, batches: Sequence[Tensor], *, halved: int = 1) -> float:
    """KL divergence (nats per output) of what the model predicts in the first halves, as in training, from
    the same with the second halves replaced.

    Attention does not let one half see the other, so without leak this is rounding. In a model of several
    layers a route that changes also changes what later routers see.

    Args: as `leak_of`.
    """
    divergences = []
    with evaluation_mode(model), training_routes(model):
        for first, second in _pairs(batches):
            log_p, log_q = (
                _front(_log_probs(model, inputs), halved)
                for inputs in (first, _spliced(first, second, halved))
            )
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
            divergences.append(kl.mean().cpu())
    return max(0.0, float(torch.stack(divergences).mean()))


def _pairs(batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Batches and as many others of the same size."""
    examples = torch.cat(list(batches[: 2 * PAIRS]))
    half = len(examples) // 2
    size = min(len(batches[0]), half)
    starts = range(0, half - size + 1, size)
    return [(examples[i : i + size], examples[half + i : half + i + size]) for i in starts]


def _log_probs(model: nn.Module, inputs: Tensor) -> Tensor:
    torch.manual_seed(0)  # for routers that add noise: the same in both
    return model(inputs).logits.double().log_softmax(dim=-1)


def _front(values: Tensor, dim: int) -> Tensor:
    """The first half."""
    return values.narrow(dim, 0, values.shape[dim] // 2)


def _spliced(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """The first half of one, the second of the other."""
    half = first.shape[dim] // 2
    return torch.cat([_front(first, dim), second.narrow(dim, half, second.shape[dim] - half)], dim=dim)


def _router_inputs(model: nn.Module, inputs: Tensor) -> dict[Router, Tensor]:
    """(B, S, D) hidden states that enter each router."""
    hidden: dict[Router, Tensor] = {}
    hooks = [
        layer.router.register_forward_pre_hook(lambda router, args: hidden.update({router: args[0]}))
        for layer in moe_layers(model).values()
    ]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden


def _changed(router: Router, hidden_BSD: Tensor, others_BSD: Tensor, halved: int) -> Tensor:
    """Share of the first halves' routes that differ once the second halves are those of `others_BSD`."""
    spliced_BSD = _spliced(hidden_BSD, others_BSD, halved)
    before_BSE, after_BSE = (_routes(router, hidden) for hidden in (hidden_BSD, spliced_BSD))
    before, after = _front(before_BSE, halved), _front(after_BSE, halved)
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
