"""Tiny models converted by hand: random partitions, random routers whose logits have standard deviation 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from monge.conversion.building import make_moe
from monge.conversion.ffn import find_ffns
from monge.conversion.types import SHARED, ExpertShape, Partition


def random_partition(shape: ExpertShape, generator: torch.Generator) -> Partition:
    """The shared neurons, and the others as evenly as they go."""
    routed = torch.arange(shape.neurons - shape.shared_neurons) % shape.routed
    labels = torch.cat([torch.full((shape.shared_neurons,), SHARED), routed])
    return Partition(labels[torch.randperm(shape.neurons, generator=generator)])


def inputs_of(module: torch.nn.Module, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(T, H) float32, what ``module`` is given when ``model`` runs."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0].flatten(0, -2).float()


def convert_by_hand(
    model: Any,
    inputs: dict[str, torch.Tensor],
    *,
    groups: int = 8,
    active: int = 4,
    shared: int = 2,
    gates: str = "standard",
    layers: Iterable[int] | None = None,
    shape_of: Callable[[int, ExpertShape], ExpertShape] = lambda layer, shape: shape,
    equal_gates: bool = False,
) -> Any:
    """Replace the FFNs of ``layers`` (all by default) in place, one after the other on the converted stream.

    With ``equal_gates`` the router is zero.
    """
    generator = torch.Generator().manual_seed(0)
    for ffn in find_ffns(model):
        if layers is not None and ffn.layer not in layers:
            continue
        weights, x_TH = ffn.read(), inputs_of(ffn.input_module, model, inputs)
        shape = shape_of(ffn.layer, ExpertShape(weights.neurons, groups, active, shared))
        router_NH = torch.randn(shape.routed, x_TH.shape[1], generator=generator)
        router_NH = router_NH / (x_TH @ router_NH.T).std(dim=0)[:, None]
        partition = random_partition(shape, generator)
        moe = make_moe(weights, partition, shape, router_NH * (not equal_gates), gates=gates)
        ffn.install(moe.to(next(model.parameters()).dtype))
    return model.eval()


def narrow_by_hand(model: Any, neurons: int, layers: Iterable[int] | None = None) -> Any:
    """Keep the first ``neurons`` of every FFN, or of those of ``layers``."""
    for ffn in find_ffns(model):
        if layers is None or ffn.layer in layers:
            ffn.narrow(ffn.read().select(torch.arange(neurons)))
    return model
