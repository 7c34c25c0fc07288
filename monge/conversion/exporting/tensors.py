"""The weights of a converted model under the keys of a standard architecture, one after the other.

Most of them are views of the model's own; only what is scaled or padded is copied, and is gone once written.

Shapes: N routed experts, I expert width, S shared width, H model width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.conversion.exporting.structure import LAYER, Structure
from monge.conversion.exporting.targets import Architecture
from monge.conversion.on_disk import in_memory, layers_on_disk
from monge.moe import MoE


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict, of tied weights only the first."""
    for piece in _pieces(model):
        yield from piece.items()


def renamed_tensors(structure: Structure, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The weights as ``architecture`` names them in its checkpoints."""
    prefixes = tuple(f"{name}." for name in structure.moes)
    for piece in _pieces(structure.model):
        for name, tensor in piece.items():
            if not name.startswith(prefixes):
                yield name, tensor
        for name, moe in structure.moes.items():
            if f"{name}.router.weight" in piece:
                yield from _renamed_layer(structure, architecture, name, moe)


def _renamed_layer(
    structure: Structure, architecture: Architecture, name: str, moe: MoE
) -> Iterator[tuple[str, Tensor]]:
    match = LAYER.fullmatch(name)
    assert match is not None, name
    layer = f"model.layers.{match[1]}"
    for part, tensor in _parts(moe, structure.expert_width, architecture.shared_width(structure)):
        key = architecture.keys.get(part)
        if key is None:
            continue
        if part == "shared_down" and architecture.shared_scale != 1:
            tensor = tensor * architecture.shared_scale
        if "{e}" in key:
            for e, weight in enumerate(tensor):
                yield f"{layer}.{key.format(e=e)}", weight
        else:
            yield f"{layer}.{key}", tensor
    for key, make in architecture.extras.items():
        if (extra := make(structure)) is not None:
            yield f"{layer}.{key}", extra


def _pieces(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The state dict: what is always in memory, then each layer on disk, read for its turn."""
    on_disk = layers_on_disk(model)
    elsewhere = tuple(f"{path}." for path in on_disk)
    seen, piece = set(), {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if name.startswith(elsewhere) or (tensor.numel() and place in seen):
            continue
        seen.add(place)
        piece[name] = tensor
    yield piece
    for path, layer in on_disk.items():
        with in_memory(layer):
            yield layer.state_dict(prefix=f"{path}.")


def _parts(moe: MoE, expert_width: int, shared_width: int) -> Iterator[tuple[str, Tensor]]:
    """The parts of a layer by their names in `Architecture.keys`, padded to the widths with zero neurons."""
    yield "router", moe.router.weight.detach()
    gate_up_NJH: Tensor = moe.experts.gate_up_proj.detach()  # type: ignore[operator]
    yield from _padded("", gate_up_NJH, moe.experts.down_proj.detach(), expert_width)
    if not shared_width:
        return
    if moe.shared is not None:
        gate_up_JH = moe.shared.input_linear.weight.detach()
        down_HS = moe.shared.output_linear.weight.detach()
    else:
        gate_up_JH, down_HS = gate_up_NJH.new_zeros(0, moe.dim), gate_up_NJH.new_zeros(moe.dim, 0)
    yield from _padded("shared_", gate_up_JH, down_HS, shared_width)


def _padded(prefix: str, gate_up: Tensor, down: Tensor, width: int) -> Iterator[tuple[str, Tensor]]:
    """(..., 2I, H) and (..., H, I) as wide as ``width``; views where they are already."""
    own = down.shape[-1]
    if missing := width - own:
        halves = [
            nnf.pad(half, (0, 0, 0, missing)) for half in (gate_up[..., :own, :], gate_up[..., own:, :])
        ]
        gate_up, down = torch.cat(halves, dim=-2), nnf.pad(down, (0, missing))
    yield f"{prefix}gate_up", gate_up
    yield f"{prefix}gate", gate_up[..., :width, :]
    yield f"{prefix}up", gate_up[..., width:, :]
    yield f"{prefix}down", down
