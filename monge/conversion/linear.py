"""Linear maps of a model, whichever way round they keep their weight: torch's and GPT-2's.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """A plain `torch.nn.Linear` or transformers' Conv1D; not a quantised or otherwise derived one."""
    return type(module) is nn.Linear or _is_transposed(module)


def shape_of(linear: Any) -> tuple[int, int]:
    """(O, I)."""
    first, second = linear.weight.shape
    return (second, first) if _is_transposed(linear) else (first, second)


def read_linear(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Copies of weight (O, I) and bias (O,) or None, float32."""
    weight = linear.weight.detach().T if _is_transposed(linear) else linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach().to(torch.float32, copy=True)
    return weight.to(torch.float32, copy=True).contiguous(), bias


def write_linear(linear: Any, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Let the map have this weight and bias, of any size, in the dtype and on the device it had.

    Raises:
        ValueError: it has a bias and is given none, or the reverse.
    """
    if (bias_O is None) != (linear.bias is None):
        has, given = ("a", "none") if bias_O is None else ("no", "one")
        raise ValueError(f"the linear map {linear} has {has} bias and is given {given}")
    old, transposed = linear.weight, _is_transposed(linear)
    value = (weight_OI.T if transposed else weight_OI).detach().to(old, copy=True).contiguous()
    linear.weight = nn.Parameter(value, requires_grad=old.requires_grad)
    if bias_O is not None:
        bias = bias_O.detach().to(linear.bias, copy=True)
        linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, size in zip(names, weight_OI.shape):
        setattr(linear, name, size)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
