"""The ways in which a pair of models can be run, for timing: one model, several computations.

Shapes: B sequences, L tokens, H model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from monge.conversion.ffn import find_ffns
from monge.conversion.types import FFN
from monge.hf.experts import NAME, THEIRS, dispatched_experts, use_experts

Contender = nn.Module | Callable[[], AbstractContextManager[nn.Module]]
"""A model, or a function that gives a context within which the model computes in a certain way."""
DENSE, LIMIT = "dense", "dense without FFNs"


def contenders(dense: nn.Module | None, converted: nn.Module) -> Mapping[str, Contender]:
    """Name -> contender.

    The dense model, and the dense model without its FFNs: what attention and the head take, which no mixture
    of experts can save. The converted one by transformers' paths and by Monge's where its experts are
    transformers' own; as it is where they are `monge.MoE`.
    """
    found: dict[str, Contender] = {}
    if dense is not None:
        found[DENSE] = dense
        found[LIMIT] = partial(without_ffns, dense, find_ffns(dense))
    if not dispatched_experts(converted):
        return found | {NAME: converted}
    found |= {f"transformers {name}": partial(with_experts, converted, name) for name in THEIRS}
    with suppress(ValueError):  # experts for which Monge has no path
        with with_experts(converted, NAME):
            pass
        found[NAME] = partial(with_experts, converted, NAME)
    return found


@contextmanager
def with_experts(model: Any, implementation: str) -> Iterator[nn.Module]:
    """The model with its experts computed in the named way, afterwards as before."""
    before = model.config._experts_implementation
    if implementation == NAME:
        use_experts(model)
    else:
        model.set_experts_implementation(implementation)
    try:
        yield model
    finally:
        model.set_experts_implementation(before)


@contextmanager
def without_ffns(dense: nn.Module, ffns: Sequence[FFN]) -> Iterator[nn.Module]:
    """The dense model, whose FFNs give zeros at no cost meanwhile."""

    def nothing(x_BLH: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(x_BLH)

    modules = {module for ffn in ffns for module in (ffn.input_module, ffn.output_module)}
    for module in modules:
        module.forward = nothing  # type: ignore[method-assign]
    try:
        yield dense
    finally:
        for module in modules:
            del module.forward
