"""What routing did: loads, violation, dead experts, drops, entropy and time, of every layer and in total.

`watch` hangs hooks on the routers of a model. They add up tensors on the device and wait for nothing; the one
synchronisation is in `Watch.metrics`. A forward that activation checkpointing repeats is not counted again.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from monge.moe.dispatch import capacity_of
from monge.routing import Router, Routing
from monge.routing.router import recomputing


class Watch(AbstractContextManager["Watch"]):
    """What `watch` returns: collects while entered, answers at any time.

    Attributes:
        routings: layer name -> its last `Routing`, detached.
    """

    def __init__(self, model: nn.Module, *, capacity_factors: Sequence[float], tensorboard: Any) -> None:
        for factor in capacity_factors:
            if not 0 < factor < float("inf"):
                raise ValueError(f"capacity_factors must be positive, got {factor} in {capacity_factors}")
        self._factors = tuple(float(factor) for factor in capacity_factors)
        self._layers = {name: _Layer(router, self._factors) for name, router in _named_routers(model).items()}
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no router of monge to watch: build its layers with monge.MoE"
            )
        self._owns_writer = isinstance(tensorboard, (str, os.PathLike))
        self._writer = _open_writer(tensorboard) if self._owns_writer else tensorboard
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        if self._hooks:
            raise RuntimeError(
                "this watch is already entered; call monge.watch(model) again for a second one"
            )
        self._hooks = [hook for layer in self._layers.values() for hook in layer.attach()]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._owns_writer:
            self._writer.close()

    @property
    def routings(self) -> dict[str, Routing]:
        """Layer name -> its last `Routing`, detached; a layer that has not run yet is absent."""
        return {name: layer.routing for name, layer in self._layers.items() if layer.routing is not None}

    def reset(self) -> None:
        """Forget everything seen so far."""
        for layer in self._layers.values():
            layer.reset()

    def metrics(self) -> dict[str, Any]:
        """``{"layers": {name: {...}}, "total": {...}}``: plain numbers since the start or `reset`.

        Synchronises with the device. Layers that have not run are left out. `watch` explains the names.

        Raises:
            RuntimeError: no forward was seen.
        """
        layers = {name: layer.metrics() for name, layer in self._layers.items() if layer.forwards}
        if not layers:
            raise RuntimeError(
                "no forward was seen: run the model inside `with monge.watch(model)`; a model compiled by "
                "torch.compile runs no hooks, so watch it uncompiled"
            )
        return {"layers": layers, "total": _total(list(layers.values()))}

    def log(self, step: int) -> dict[str, Any]:
        """Write every scalar of `metrics` to TensorBoard as ``monge/<layer>/<metric>``; returns the metrics.

        Raises:
            ValueError: the watch was made without ``tensorboard=``.
        """
        if self._writer is None:
            raise ValueError("log needs a TensorBoard writer: monge.watch(model, tensorboard='runs/name')")
        metrics = self.metrics()
        for name, values in [*metrics["layers"].items(), ("total", metrics["total"])]:
            for metric, value in _scalars(values):
                self._writer.add_scalar(f"monge/{name}/{metric}", value, step)
        return metrics


def watch(
    model: nn.Module, *, capacity_factors: Sequence[float] = (1, 1.25), tensorboard: Any = None
) -> Watch:
    """Watch the routers inside ``model``: ``with monge.watch(model) as w: ...``, then ``w.metrics()``.

    Args:
        model: any module with `MoE` layers (or routers) inside, at any depth.
        capacity_factors: the cf for which ``drops`` tells what a static capacity would drop.
        tensorboard: a folder, or a ``SummaryWriter``, for ``w.log(step)``; None for neither.

    Metrics of a layer, with n_e its slots on expert e over all forwards and p_e = n_e / sum n:

        forwards, tokens     forwards seen, valid tokens in them
        loads                [n_e], slots
        max_violation        max n_e / mean n_e - 1 (MaxVio_global, arXiv 2408.15664); 0: balanced
        max_violation_batch  the same of each forward by itself (MaxVio_batch), averaged
        cv                   standard deviation (population) of n_e / mean n_e
        dead_experts         number of experts with n_e = 0
        load_entropy         -sum_e p_e ln p_e, nats; ln E: balanced
        routing_entropy      entropy of softmax(logits), mean over tokens, nats
        drops                {cf: share of the slots that exceed ceil(cf N / E) on their expert in a forward}
        ot_steps             optimizer steps routed by transport meanwhile, where the router counts them
        ms_route             milliseconds of routing per forward (the device's own clock on an accelerator)

    In total, ``loads`` lists the experts of layer after layer, ``drops`` is the share of all slots,
    ``forwards`` and ``tokens`` are those of the layer that saw most; ``dead_experts``, ``ot_steps`` and
    ``ms_route`` are sums over layers, the others means. A data-parallel rank sees its own tokens only.

    Raises:
        ValueError: ``model`` has no router, or a capacity factor is not positive.
        ImportError: ``tensorboard`` is a folder and the package is not installed.

    Examples:
        >>> import torch, monge
        >>> layer = monge.MoE(8, 16, 4, 2, router="topk")
        >>> with monge.watch(layer) as w:
        ...     _ = layer(torch.randn(5, 8))
        >>> total = w.metrics()["total"]
        >>> total["tokens"], sum(total["loads"]), total["max_violation"] >= 0
        (5, 10, True)
    """
    return Watch(model, capacity_factors=capacity_factors, tensorboard=tensorboard)


class _Layer:
    """The running sums of one router."""

    def __init__(self, router: Router, factors: tuple[float, ...]) -> None:
        self.router = router
        self.factors = factors
        self.reset()

    def reset(self) -> None:
        self.forwards = 0
        self.routing: Routing | None = None
        self.sums: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.events: list[tuple[torch.Event, torch.Event]] = []
        self.start: float | torch.Event | None = None
        steps = getattr(self.router, "ot_steps", None)
        self.ot_start = steps.clone() if steps is not None else None

    def attach(self) -> Iterable[Any]:
        yield self.router.register_forward_pre_hook(self._before)
        yield self.router.register_forward_hook(self._after)

    def _before(self, router: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and not recomputing():
            self.start = _now(self.router.weight.device)

    def _after(self, router: nn.Module, args: Any, routing: Routing) -> None:
        if torch.compiler.is_compiling() or recomputing():
            return
        now = _now(self.router.weight.device)
        if isinstance(now, float):
            assert isinstance(self.start, float)
            self.seconds += now - self.start
        else:
            assert isinstance(self.start, torch.Event)
            self.events.append((self.start, now))
        floats = {name: getattr(routing, name) for name in ("weights", "logits", "aux_loss", "prices")}
        self.routing = replace(routing, **{n: x.detach() for n, x in floats.items() if x is not None})
        self.forwards += 1
        for name, value in self._of_one_forward(self.routing).items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    @torch.no_grad()
    def _of_one_forward(self, routing: Routing) -> dict[str, Tensor]:
        E = routing.num_experts
        exact = torch.float32 if routing.logits.device.type == "mps" else torch.float64
        loads_E = routing.loads
        slots = loads_E.sum()
        valid_T = torch.isfinite(routing.logits).any(1) if routing.mask is None else routing.mask
        entropy_T = torch.special.entr(routing.logits.softmax(dim=1)).sum(dim=1)
        violation = loads_E.amax().to(exact) * E / slots.clamp(min=1) - 1
        capacities = [capacity_of(slots, E, factor) for factor in self.factors]
        return {
            "loads": loads_E,
            "tokens": valid_T.sum(),
            "entropy": torch.where(valid_T, entropy_T, 0).sum(dtype=exact),
            "batches": (slots > 0).to(torch.int64),
            "violation": torch.where(slots > 0, violation, 0),
            **{
                f"drops {factor}": (loads_E - capacity).clamp(min=0).sum()
                for factor, capacity in zip(self.factors, capacities)
            },
        }

    def metrics(self) -> dict[str, Any]:
        for start, end in self.events:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
        self.events = []
        sums = {name: value.cpu() for name, value in self.sums.items()}
        loads_E = sums["loads"].double()
        slots = float(loads_E.sum())
        mean = slots / len(loads_E)
        tokens = int(sums["tokens"])
        ot_now: Any = getattr(self.router, "ot_steps", None)
        return {
            "forwards": self.forwards,
            "tokens": tokens,
            "loads": sums["loads"].tolist(),
            "max_violation": float(loads_E.max()) / mean - 1 if slots else 0.0,
            "max_violation_batch": float(sums["violation"]) / max(int(sums["batches"]), 1),
            "cv": float(loads_E.std(correction=0)) / mean if slots else 0.0,
            "dead_experts": int((loads_E == 0).sum()),
            "load_entropy": float(torch.special.entr(loads_E / max(slots, 1)).sum()),
            "routing_entropy": float(sums["entropy"]) / max(tokens, 1),
            "drops": {factor: float(sums[f"drops {factor}"]) / max(slots, 1) for factor in self.factors},
            "ot_steps": 0 if self.ot_start is None else int(ot_now) - int(self.ot_start),
            "ms_route": 1000 * self.seconds / self.forwards,
        }


def _total(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The line for the whole model; how each metric is put together is told in `watch`."""
    slots = [sum(layer["loads"]) for layer in layers]
    total: dict[str, Any] = {}
    for metric in layers[0]:
        values = [layer[metric] for layer in layers]
        if metric == "loads":
            total[metric] = [load for loads in values for load in loads]
        elif metric == "drops":
            total[metric] = {
                factor: sum(drops[factor] * n for drops, n in zip(values, slots)) / max(sum(slots), 1)
                for factor in values[0]
            }
        elif metric in ("forwards", "tokens"):
            total[metric] = max(values)
        elif metric in ("dead_experts", "ot_steps", "ms_route"):
            total[metric] = sum(values)
        else:
            total[metric] = sum(values) / len(values)
    return total


def _scalars(values: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for metric, value in values.items():
        if metric == "drops":
            yield from ((f"drops@{factor:g}", share) for factor, share in value.items())
        elif metric != "loads":
            yield metric, value


def _named_routers(model: nn.Module) -> dict[str, Router]:
    """By name of the layer: the path of what holds the router (of the router itself, if that is taken)."""
    named: dict[str, Router] = {}
    for path, module in model.named_modules():
        if isinstance(module, Router):
            layer = path.rpartition(".")[0] or path or "router"
            named[path if layer in named else layer] = module
    return named


def _now(device: torch.device) -> float | torch.Event:
    """Seconds on the CPU; on an accelerator an event in its stream, so that nothing waits."""
    if device.type in ("cpu", "meta"):
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _open_writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard= needs the package tensorboard: pip install tensorboard") from error
    try:
        return SummaryWriter(os.fspath(folder))
    except OSError as error:
        raise OSError(
            f"tensorboard={os.fspath(folder)!r} cannot be written: {error.strerror or error}"
        ) from error
