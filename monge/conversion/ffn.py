"""Finding the feed-forward networks of a model: by structure, then confirmed by behaviour.

A candidate is a module whose linear maps have the shapes of an FFN (`monge.conversion.layouts`) and whose
activation, compared on a grid, is one of `monge.moe.activations.ACTIVATIONS`. It counts only if the weights
read from it reproduce its output on random inputs, so that neither names nor the order of gate and up
projection need to be known.

Shapes: H model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.layouts import LOOKED_FOR, activation_name, functions_in, layouts_of
from monge.conversion.linear import is_linear, read_linear, shape_of, write_linear
from monge.conversion.on_disk import in_memory
from monge.conversion.types import FFN, FFNWeights
from monge.moe.activations import ACTIVATIONS

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # of transformers' configurations


@dataclass(frozen=True, repr=False)
class FoundFFN:
    """An FFN where it stands in its model; implements `monge.conversion.types.FFN`.

    The projections are paths in the model, ``gate`` equal to ``up`` when one map holds both (gate first).
    ``after`` are the modules that follow ``name`` within the FFN; they become identities when it is replaced.
    """

    model: nn.Module
    layer: int
    activation: str
    name: str
    up: str
    down: str
    gate: str | None
    after: tuple[str, ...]

    @property
    def input_module(self) -> nn.Module:
        """Its forward takes x (..., H) as first argument."""
        return self.model.get_submodule(self.name)

    @property
    def output_module(self) -> nn.Module:
        """Its forward returns y (..., H)."""
        return self.model.get_submodule((self.name, *self.after)[-1])

    @property
    def down_module(self) -> nn.Module:
        """Its last projection."""
        return self.model.get_submodule(self.down)

    def in_memory(self) -> AbstractContextManager[None]:
        """The weights of its layer are in memory meanwhile (`monge.conversion.on_disk`)."""
        position = _position(self.model, self.name)
        assert position is not None
        return in_memory(self.model.get_submodule(f"{position[0]}.{position[1]}"))

    def read(self) -> FFNWeights:
        """A copy of the dense weights, float32; sizes without values where the layer lies on disk.

        Raises:
            ValueError: the FFN has been replaced.
        """
        gate_FH = gate_bias_F = None
        try:
            up_FH, up_bias_F = read_linear(self.model.get_submodule(self.up))
            down_HF, down_bias_H = read_linear(self.model.get_submodule(self.down))
            if self.gate:
                gate_FH, gate_bias_F = read_linear(self.model.get_submodule(self.gate))
        except AttributeError as error:
            raise ValueError(f"{self.name} no longer holds a dense FFN: read it before install()") from error
        if self.gate == self.up:
            gate_FH, up_FH = up_FH.chunk(2)
            if up_bias_F is not None:
                gate_bias_F, up_bias_F = up_bias_F.chunk(2)
        return FFNWeights(self.activation, up_FH, down_HF, gate_FH, gate_bias_F, up_bias_F, down_bias_H)

    def install(self, module: nn.Module) -> None:
        """Let ``module``, (..., H) -> (..., H), take the FFN's place, in its mode (training or evaluation).

        A dropout at the end of the FFN's own module (GPT-2) goes with it.
        """
        module.train(self.input_module.training)
        self.model.set_submodule(self.name, module, strict=True)
        for path in self.after:
            self.model.set_submodule(path, nn.Identity(), strict=True)

    def narrow(self, weights: FFNWeights) -> None:
        """Put an FFN with another number of neurons into the model's own modules.

        Raises:
            ValueError: a bias that the modules have no place for, or lack.
        """
        up: tuple[Tensor, Tensor | None] = weights.up_FH, weights.up_bias_F
        if self.gate and weights.gate_FH is not None:
            gate = weights.gate_FH, weights.gate_bias_F
            if self.gate == self.up:
                biases = [bias for bias in (gate[1], up[1]) if bias is not None]
                up = torch.cat([gate[0], up[0]]), torch.cat(biases) if biases else None
            else:
                write_linear(self.model.get_submodule(self.gate), *gate)
        write_linear(self.model.get_submodule(self.up), *up)
        write_linear(self.model.get_submodule(self.down), weights.down_HF, weights.down_bias_H)
        module: Any = self.input_module
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = weights.neurons

    def __repr__(self) -> str:
        return f"FoundFFN({self.name!r}, layer={self.layer}, activation={self.activation!r})"


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs of ``model``, one per layer, in order.

    Raises:
        ValueError: there is none, a layer has none or several, or the model has experts already; the message
            says what was looked for and what was found.

    Examples:
        >>> from torch import nn
        >>> from monge.conversion.ffn import find_ffns
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Module()
        >>> model.layers = nn.ModuleList([Block(), Block()])
        >>> find_ffns(model)  # doctest: +NORMALIZE_WHITESPACE
        [FoundFFN('layers.0.mlp', layer=0, activation='gelu'),
         FoundFFN('layers.1.mlp', layer=1, activation='gelu')]
    """
    _refuse_experts(model)
    found: dict[str, list[FFN]] = {}
    rejected: list[str] = []
    with _evaluating(model), torch.no_grad():
        for name, _ in model.named_modules():
            if (position := _position(model, name)) is None:
                continue
            home, layer = position
            reasons: list[str] = []
            for candidate in _candidates(model, name, layer, reasons):
                with candidate.in_memory():
                    difference = _difference(candidate)
                if not difference:
                    found.setdefault(home, []).append(candidate)
                    break
                reasons.append(f"{candidate.name}: {difference}")
            else:
                rejected += reasons[:1]
    if len(found) != 1:
        seen = f"FFNs in {', '.join(found)}" if found else f"no FFN, but {_linear_maps(model)}"
        raise _unsupported(model, seen, rejected)
    (ffns,) = found.values()
    counts = [sum(ffn.layer == layer for ffn in ffns) for layer in range(len(layers_of(model, ffns)))]
    if odd := [f"{count} in layer {layer}" for layer, count in enumerate(counts) if count != 1]:
        raise _unsupported(model, f"FFNs: {', '.join(odd)} of {len(counts)}", rejected)
    return ffns


def layers_of(model: nn.Module, ffns: Sequence[FFN]) -> nn.ModuleList:
    """The list whose elements hold the FFNs, one each.

    Raises:
        ValueError: the FFNs do not stand in one list.
    """
    homes = {position[0] for ffn in ffns if (position := _position(model, ffn.name))}
    if len(homes) != 1:
        raise ValueError(f"the FFNs must stand in one torch.nn.ModuleList; found {sorted(homes) or 'none'}")
    layers = model.get_submodule(homes.pop())
    assert isinstance(layers, nn.ModuleList)
    return layers


def _candidates(model: nn.Module, name: str, layer: int, reasons: list[str]) -> Iterator[FoundFFN]:
    """Layouts that fit, each with the activations in its module; ``reasons`` says where those are unknown."""
    for layout in layouts_of(model, name):
        gated, owner = layout.gate is not None, model.get_submodule(layout.name)
        functions = functions_in(owner)
        names = [n for f in functions.values() if (n := activation_name(f, gated=gated)) is not None]
        if not names:
            known = ", ".join(n for n, activation in ACTIVATIONS.items() if activation.gated == gated)
            seen = ", ".join(functions) or "not found"
            reasons.append(
                f"{layout.name} ({type(owner).__name__}): its activation ({seen}) is none of {known}"
            )
        for activation in names:
            yield FoundFFN(model, layer, activation, *layout)


def _difference(ffn: FoundFFN) -> str:
    """How the FFN's output differs from that of the weights read from it; empty if it does not."""
    weights = ffn.read()
    place: Any = ffn.model.get_submodule(ffn.up).weight
    x = torch.randn(1, 8, weights.up_FH.shape[1], generator=torch.Generator().manual_seed(0)).to(place)
    try:
        y = ffn.input_module(x)
        for path in ffn.after:
            y = ffn.model.get_submodule(path)(y)
        wanted = weights(x.float())
        error = (y.float() - wanted).norm()
    except Exception as problem:  # a module of other inputs or outputs
        return f"it cannot be called as an FFN ({problem})"
    if error <= torch.finfo(place.dtype).eps ** 0.5 * wanted.norm():
        return ""
    return f"its output is not that of a {ffn.activation} FFN, but {error / wanted.norm():.2g} off"


def _position(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The outermost ModuleList that a path leads through, and the index there."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        home = ".".join(parts[:i])
        if part.isdigit() and isinstance(model.get_submodule(home), nn.ModuleList):
            return home, int(part)
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, afterwards each module's own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _refuse_experts(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    counts = {name: getattr(config, name, None) for name in EXPERT_COUNTS}
    found = [f"{name} = {count}" for name, count in counts.items() if isinstance(count, int) and count > 1]
    for name, module in model.named_modules():
        stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
        several = sum(p.ndim == 3 for p in module.parameters(recurse=False)) > 1
        if several and len(stacked) == 1 and stacked != {1}:
            found.append(f"{name} holds {stacked.pop()} experts")
    if found:
        raise ValueError(
            f"{type(model).__name__} is a Mixture of Experts already ({found[0]}): name a dense model"
        )


def _linear_maps(model: nn.Module) -> str:
    """Of the first layer, for the message that there is no FFN."""
    inside = [(n, m) for n, m in model.named_modules() if (at := _position(model, n)) and at[1] == 0]
    maps = [f"{name} {shape_of(module)}" for name, module in inside if is_linear(module)]
    return f"the linear maps {', '.join(maps[:8])}" if maps else "no linear maps in a ModuleList"


def _unsupported(model: nn.Module, found: str, rejected: list[str]) -> ValueError:
    close = f" Closest: {'; '.join(rejected[:3])}." if rejected else ""
    return ValueError(
        f"{type(model).__name__} is not supported. Looked for {LOOKED_FOR}. Found {found}.{close} Name a "
        "dense model of a supported kind, such as Llama, Mistral, Qwen, Granite, Gemma, GPT-2, BERT or ViT."
    )
