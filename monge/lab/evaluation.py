"""What a trained model is worth, and what its routing does: losses on validation data, loads, leak and time.

Shapes: N examples, D domains, L MoE layers, E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from monge.lab.bias import bias_figures
from monge.lab.config import ExperimentConfig
from monge.lab.examples import Data, Examples, losses_of
from monge.lab.leak import leak_kl_of, leak_of
from monge.lab.loads import LoadCounter, max_violation
from monge.lab.models import evaluation_mode, moe_layers, parameter_counts, static_capacity
from monge.lab.specialisation import mutual_information
from monge.monitor import watch
from monge.routing import training_routes

TIMED_BATCHES = 12  # forwards that ms_route averages over, after one to warm up
CAPACITIES = {"cf1": 1.0, "cf125": 1.25}
"""Suffix of a field -> static capacity factor."""


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Examples, config: ExperimentConfig) -> float:
    """Mean cross-entropy per target (nats) in evaluation mode, in batches of the training size."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluation_mode(model):
        for batch in examples.batches(config):
            losses = losses_of(model, batch)
            total += losses.sum().cpu().double()
            count += len(losses)
    return float(total) / count


def evaluate(model: nn.Module, data: Data, config: ExperimentConfig) -> dict[str, Any]:
    """The fields of an ``eval`` record that the trained model decides.

    ``val_loss`` routes token by token as the router does in evaluation mode (stored prices included where it
    has any) and drops nothing; ``val_loss_own`` as the method itself routes: MaxScore with its prices,
    routers that look at the batch, and layers with a capacity, as in training, the others the same as
    ``val_loss``. ``val_loss_cf1`` and ``val_loss_cf125`` are the former with a static capacity of 1 and 1.25
    times an equal share per batch, ``val_loss_own_cf1`` and ``val_loss_own_cf125`` the latter.
    ``max_violation`` (largest over mean load, minus 1; mean over layers) and ``dead_experts`` (in all layers)
    count the slots of the whole set. ``specialisation`` is the mutual information of expert and domain, None
    where there is one domain. Fields about routing are None for a dense model.
    """
    by_domain, loads_DLE = _by_domain(model, data.val, config)
    loss = sum(mean * count for mean, count in by_domain.values()) / len(data.val)
    loads_LE = loads_DLE.sum(dim=0)
    total, active = parameter_counts(model, config)
    result: dict[str, Any] = {
        "val_loss": loss,
        "val_loss_own": None,
        **{f"val_loss{own}_{name}": None for own in ("", "_own") for name in CAPACITIES},
        "val_loss_by_domain": {data.domain_names[d]: mean for d, (mean, _) in by_domain.items()},
        "max_violation": None,
        "dead_experts": None,
        "leak": None,
        "leak_kl": None,
        "specialisation": None,
        "ms_route": None,
        "ot_steps": None,
        "params_total": total,
        "params_active": active,
        "loads": (loads_LE / loads_LE.sum(dim=-1, keepdim=True)).tolist(),
        "bias_gap": None,
        "bias_gradient": None,
        **data.robustness(model, config),
    }
    if not moe_layers(model):
        return result
    inputs = [batch.inputs_N for batch in data.val.batches(config)]
    return result | {
        **_losses(model, data.val, config, loss),
        "max_violation": float(max_violation(loads_LE).mean()),
        "dead_experts": int((loads_LE == 0).sum()),
        "leak": leak_of(model, inputs, halved=data.halved),
        "leak_kl": leak_kl_of(model, inputs, halved=data.halved),
        "specialisation": mutual_information(loads_DLE) if len(by_domain) > 1 else None,
        "ot_steps": _ot_steps(model),
        "ms_route": _ms_route(model, inputs, config),
        **bias_figures(model, next(data.val.batches(config)), config),
    }


def _by_domain(
    model: nn.Module, examples: Examples, config: ExperimentConfig
) -> tuple[dict[int, tuple[float, int]], Tensor]:
    """Domain -> mean loss and number of examples, and (D, L, E) slots of those domains."""
    by_domain, loads = {}, []
    with LoadCounter(model) as counter, static_capacity(model, None):
        for domain in examples.domain_N.unique().tolist():
            part = examples.take(examples.domain_N == domain)
            by_domain[domain] = mean_loss(model, part, config), len(part)
            loads.append(counter.take())
    return by_domain, torch.stack(loads)


def _losses(model: nn.Module, val: Examples, config: ExperimentConfig, loss: float) -> dict[str, float]:
    """The losses of `evaluate` beside ``val_loss``."""
    losses = {}
    for name, factor in CAPACITIES.items():
        with static_capacity(model, factor):
            losses[f"val_loss_{name}"] = mean_loss(model, val, config)
    with _own_routing(model) as differs:
        losses["val_loss_own"] = mean_loss(model, val, config) if differs else loss
        for name, factor in CAPACITIES.items():
            with static_capacity(model, factor):
                own = mean_loss(model, val, config) if differs else losses[f"val_loss_{name}"]
            losses[f"val_loss_own_{name}"] = own
    return losses


@contextmanager
def _own_routing(model: nn.Module) -> Iterator[bool]:
    """Routes as the method itself does, see `evaluate`; whether that differs from evaluation mode."""
    layers = list(moe_layers(model).values())
    routers: list[Any] = [layer.router for layer in layers]
    if all(r.causal_train for r in routers) and all(layer.capacity_factor is None for layer in layers):
        yield False
    elif all(hasattr(router, "eval_prices") for router in routers):
        before = [router.eval_prices for router in routers]
        try:
            for router in routers:
                router.eval_prices = True
            yield True
        finally:
            for router, value in zip(routers, before):
                router.eval_prices = value
    else:
        torch.manual_seed(0)  # for routers that add noise
        with training_routes(model):
            yield True


def _ot_steps(model: nn.Module) -> int | None:
    """Transport steps of SSR, summed over layers, since each draws its own; None for other routers."""
    counts = [getattr(layer.router, "ot_steps", None) for layer in moe_layers(model).values()]
    return sum(int(count) for count in counts if count is not None) if None not in counts else None


def _ms_route(model: nn.Module, batches: list[Tensor], config: ExperimentConfig) -> float:
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
        model(batches[0])
        watched.reset()
        for inputs in batches[:TIMED_BATCHES]:
            model(inputs)
        return statistics.fmean(layer["ms_route"] for layer in watched.metrics()["layers"].values())
