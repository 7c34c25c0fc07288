"""Layers that lie on disk: in memory only while they are used, so that a model may be larger than memory.

    safetensors --> [layer in memory, float32] --> used, perhaps replaced and kept --> sizes without values

A layer on disk holds tensors of the meta device, which have sizes and no values. Its own forward reads it and
lets go of it again, so that the model is called like any other; `in_memory` holds it for longer, which saves
reading it again. What was changed meanwhile is lost unless `keep` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from monge.conversion.stages import Stages
from monge.routing.router import Router
from monge.workspace.finite import all_finite
from monge.workspace.memory import give_back

_MARK = "on_disk"  # attribute of a layer that lies on disk


@dataclass
class Place:
    """Where the tensors of a layer are: for each of its names a file and the key there.

    ``users`` counts who holds the layer in memory.
    """

    keys: Mapping[str, tuple[Path, str]]
    users: int = 0

    def take(self, layer: nn.Module) -> None:
        """Read the layer, unless it is in memory."""
        if not self.users:
            layer.load_state_dict(read_tensors(self.keys), assign=True)
        self.users += 1

    def leave(self, layer: nn.Module) -> None:
        """Let go of the weights when nobody needs them any more."""
        if not self.users:  # its reading failed
            return
        self.users -= 1
        if not self.users:
            _drop(layer)
            give_back()


def _drop(layer: nn.Module) -> None:
    """Routers stay: they are a few per mille, and an export chooses its architecture by their values."""
    routers = [f"{name}." for name, module in layer.named_modules() if isinstance(module, Router)]
    state = layer.state_dict()
    dropped = {name: t.to("meta") for name, t in state.items() if not name.startswith(tuple(routers))}
    layer.load_state_dict(state | dropped, assign=True)


def put_on_disk(layer: nn.Module, keys: Mapping[str, tuple[Path, str]]) -> None:
    """From now on the tensors of ``layer``, by their names in its state dict, are those in the files."""
    place = Place(keys)
    setattr(layer, _MARK, place)
    # the hooks hold no layer: a model must go when its last reference does
    layer.register_forward_pre_hook(lambda module, _: place.take(module))
    layer.register_forward_hook(lambda module, *_: place.leave(module), always_call=True)


def place_of(layer: nn.Module) -> Place | None:
    """Where the layer lies on disk; None if it is in memory for good."""
    return getattr(layer, _MARK, None)


@contextmanager
def in_memory(layer: nn.Module) -> Iterator[None]:
    """The weights of ``layer`` are in memory meanwhile; nothing is done where they always are.

    Raises:
        ValueError: a file cannot be read, or a weight is NaN or infinite.
    """
    place = place_of(layer)
    if place is None:
        yield
        return
    place.take(layer)
    try:
        yield
    finally:
        place.leave(layer)


def keep(layer: nn.Module, stages: Stages, name: str) -> None:
    """Write a layer on disk as it now is; from now on it is read from there. Others need no keeping.

    Raises:
        OSError: it could not be written.
    """
    place, path = place_of(layer), stages.path(name)
    if place is None:
        return
    assert path is not None, "layers on disk need a folder"
    state = layer.state_dict()
    stages.save(name, state, {})
    place.keys = {key: (path, key) for key in state}


def layers_on_disk(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that lie on disk, by their path in the model."""
    return {name: module for name, module in model.named_modules() if place_of(module) is not None}


def largest_layer(model: nn.Module) -> int:
    """Bytes of the largest layer on disk once it is read; 0 where there is none."""
    layers = layers_on_disk(model).values()
    return max((sum(tensor.nbytes for tensor in layer.state_dict().values()) for layer in layers), default=0)


def read_tensors(keys: Mapping[str, tuple[Path, str]]) -> dict[str, Tensor]:
    """The named tensors, floating-point ones in float32.

    Raises:
        ValueError: a file cannot be read, or holds NaN or infinite values.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for file, _ in keys.values()}):
        try:
            with safe_open(file, framework="pt") as opened:
                for name, (where, key) in keys.items():
                    if where == file:
                        tensors[name] = _in_float32(opened.get_tensor(key))
        except Exception as error:  # safetensors raises its own kinds
            raise ValueError(f"{file} cannot be read ({error}): fetch the checkpoint anew") from error
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            file, key = keys[name]
            raise ValueError(f"{file}: {key} holds NaN or infinite values: fetch the checkpoint anew")
    return tensors


def _in_float32(tensor: Any) -> Tensor:
    """A copy: what was read is mapped from the file."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
