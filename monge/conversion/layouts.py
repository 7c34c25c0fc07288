"""Where the projections of an FFN may stand in a module, and which activation is between them.

Four layouts are known, by the shapes of the linear maps and not by their names:

- gated: (F, H), (F, H), (H, F) in one module (Llama, Mistral, Qwen, Granite, Gemma);
- gated, both in one map: (2F, H), (H, F) in one module (Phi-3);
- plain: (F, H), (H, F) in one module (GPT-2, ViT);
- split: (F, H) and the activation in one module, (H, F) in the next (BERT), which keeps its dropout, residual
  connection and LayerNorm.

Not covered: layers that hold the projections themselves, beside attention (OPT).

Shapes: H model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monge.conversion.linear import is_linear, shape_of
from monge.moe.activations import ACTIVATIONS

LOOKED_FOR = (
    "modules of three linear maps (F, H), (F, H), (H, F) with an activation, fused ones (2F, H), (H, F), or "
    "plain ones (F, H), (H, F), one in each element of one torch.nn.ModuleList"
)


class Layout(NamedTuple):
    """Paths in the model. ``gate`` is None in a plain FFN, and ``up`` where one map holds both (gate first).

    ``name`` is the module that x enters; ``after`` are those that follow it within the FFN.
    """

    name: str
    up: str
    down: str
    gate: str | None = None
    after: tuple[str, ...] = ()


def layouts_of(model: nn.Module, name: str) -> Iterator[Layout]:
    """Every way to see the module at ``name`` as an FFN that fits its shapes."""
    module = model.get_submodule(name)
    maps = {f"{name}.{child}": value for child, value in module.named_children() if is_linear(value)}
    if len(maps) in (2, 3) and count_parameters(module) == sum(map(count_parameters, maps.values())):
        for *gate, up, down in permutations(maps):
            F, H = shape_of(maps[up])
            if shape_of(maps[down]) == (H, F) and all(shape_of(maps[path]) == (F, H) for path in gate):
                yield Layout(name, up, down, gate[0] if gate else None)
            elif not gate and F % 2 == 0 and shape_of(maps[down]) == (H, F // 2):
                yield Layout(name, up, down, up)
        return
    single = {
        child: inner[0]
        for child, value in module.named_children()
        if len(inner := [n for n, m in value.named_children() if is_linear(m)]) == 1
    }
    for first, second in permutations(single, 2):
        up, down = f"{first}.{single[first]}", f"{second}.{single[second]}"
        a, b = module.get_submodule(up), module.get_submodule(down)
        alone = count_parameters(module.get_submodule(first)) == count_parameters(a)
        if alone and shape_of(a) == shape_of(b)[::-1]:
            up, down = f"{name}.{up}", f"{name}.{down}"
            yield Layout(f"{name}.{first}", up, down, after=(down,))


def functions_in(module: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """What may be the activation: submodules without parameters, and functions kept as attributes."""
    children = {
        type(child).__name__: child
        for child in module.children()
        if not count_parameters(child) and not isinstance(child, nn.Dropout)
    }
    kept = {
        name: value for name, value in vars(module).items() if callable(value) and not isinstance(value, type)
    }
    return {**children, **kept}


def activation_name(function: Callable[[Tensor], Tensor], *, gated: bool) -> str | None:
    """The name in `ACTIVATIONS` of the activation that ``function`` equals on [-6, 6], or None.

    Examples:
        >>> from torch import nn
        >>> from monge.conversion.layouts import activation_name
        >>> activation_name(nn.SiLU(), gated=True)
        'swiglu'
        >>> activation_name(nn.Tanh(), gated=False) is None
        True
    """
    grid = torch.linspace(-6, 6, 97, dtype=torch.float64)
    try:
        values = function(grid)
        for name, activation in ACTIVATIONS.items():
            if activation.gated == gated and torch.allclose(
                values, activation.function(grid), rtol=0, atol=1e-6
            ):
                return name
    except Exception:  # any callable is asked, most of them are no activation
        return None
    return None


def count_parameters(module: nn.Module) -> int:
    """Elements of all its parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
