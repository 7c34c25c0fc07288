"""What a trained model is worth, and what its routing does: losses on validation text, loads, leak and time.

Shapes: N windows, S context, L MoE layers, E experts.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.lab.leak import leak_of
from monge.lab.loads import LoadCounter, max_violation
from monge.lab.models import evaluation_mode, moe_layers, parameter_counts
from monge.lab.presets import CompareConfig
from monge.monitor import watch
from monge.routing import training_routes

TIMED_BATCHES = 12  # forwards that ms_route averages over, after one to warm up


@torch.no_grad()
def mean_loss(model: nn.Module, windows_NS: Tensor, config: CompareConfig) -> float:
    """Mean cross-entropy per token (nats) in evaluation mode, in batches of the training size."""
    total = torch.zeros((), dtype=torch.float64)
    with evaluation_mode(model):
        for tokens_BS in windows_NS.split(config.batch):
            tokens_BS = tokens_BS.to(config.device)
            logits_BSV = model(input_ids=tokens_BS[:, :-1]).logits
            loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="sum")
            total += loss.cpu().double()
    return float(total) / (len(windows_NS) * (windows_NS.shape[1] - 1))


def evaluate(model: nn.Module, val_NS: Tensor, config: CompareConfig) -> dict[str, Any]:
    """The fields of an ``eval`` record that the trained model decides.

    ``val_loss`` routes token by token as the router does in evaluation mode (stored prices included where it
    has any); ``val_loss_own`` as the method itself routes: MaxScore with its prices, routers that look at the
    batch as in training, per-token routers the same as ``val_loss``. ``max_violation`` (largest over mean
    load, minus 1; mean over layers) and ``dead_experts`` (in all layers) count the slots of the whole set.
    Fields about routing are None for a dense model.
    """
    with LoadCounter(model) as counter:
        loss = mean_loss(model, val_NS, config)
        loads_LE = counter.take()
    total, active = parameter_counts(model, config)
    result: dict[str, Any] = {
        "val_loss": loss,
        "val_loss_own": None,
        "max_violation": None,
        "dead_experts": None,
        "leak": None,
        "ms_route": None,
        "ot_steps": None,
        "params_total": total,
        "params_active": active,
        "loads": (loads_LE / loads_LE.sum(dim=-1, keepdim=True)).tolist(),
    }
    if not moe_layers(model):
        return result
    batches = [tokens_BS[:, :-1].to(config.device) for tokens_BS in val_NS.split(config.batch)]
    return result | {
        "val_loss_own": _own_loss(model, val_NS, config, loss),
        "max_violation": float(max_violation(loads_LE).mean()),
        "dead_experts": int((loads_LE == 0).sum()),
        "leak": leak_of(model, batches),
        "ot_steps": _ot_steps(model),
        "ms_route": _ms_route(model, batches, config),
    }


def _own_loss(model: nn.Module, val_NS: Tensor, config: CompareConfig, loss: float) -> float:
    routers: list[Any] = [layer.router for layer in moe_layers(model).values()]
    if all(router.causal_train for router in routers):
        return loss
    if all(hasattr(router, "eval_prices") for router in routers):
        before = [router.eval_prices for router in routers]
        try:
            for router in routers:
                router.eval_prices = True
            return mean_loss(model, val_NS, config)
        finally:
            for router, value in zip(routers, before):
                router.eval_prices = value
    torch.manual_seed(0)  # for routers that add noise
    with training_routes(model):
        return mean_loss(model, val_NS, config)


def _ot_steps(model: nn.Module) -> int | None:
    """Transport steps of SSR, summed over layers, since each draws its own; None for other routers."""
    counts = [getattr(layer.router, "ot_steps", None) for layer in moe_layers(model).values()]
    return sum(int(count) for count in counts if count is not None) if None not in counts else None


def _ms_route(model: nn.Module, batches: list[Tensor], config: CompareConfig) -> float:
    """Milliseconds of routing per layer and training forward.

    SSR is the mean of its two branches, weighted by how often it took each.
    """
    with training_routes(model):
        as_trained = _watched_ms(model, batches)
    transported = _ot_steps(model)
    if transported is None:
        return as_trained
    share = transported / (config.steps * config.layers)
    return share * as_trained + (1 - share) * _watched_ms(model, batches)


@torch.no_grad()
def _watched_ms(model: nn.Module, batches: list[Tensor]) -> float:
    with evaluation_mode(model), watch(model) as watched:
        model(input_ids=batches[0])
        watched.reset()
        for tokens_BS in batches[:TIMED_BATCHES]:
            model(input_ids=tokens_BS)
        return statistics.fmean(layer["ms_route"] for layer in watched.metrics()["layers"].values())
