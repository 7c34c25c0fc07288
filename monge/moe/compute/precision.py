"""In which dtype matrix products run.

A processor without units for bfloat16 multiplies such matrices several times slower than float32 ones (AMD
EPYC with AVX2: 10 against 60 GFLOP/s on one core). There the weights of one expert at a time are widened, and
the products, sums and activations are float32: faster, and one rounding instead of four.

Shapes: E experts, X and Y the sides of a weight matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from monge.moe.compute.memory import empty

_UNITS = {  # names of torch.cpu's questions: any of them means that products of this dtype are fast
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_avx512_fp16_supported", "_is_amx_fp16_supported"),
}


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or float32 for a narrower one on a processor without units for it."""
    return torch.float32 if device.type == "cpu" and dtype in _UNITS and not _has_units(dtype) else dtype


@cache
def _has(question: str) -> bool:
    return bool(getattr(torch.cpu, question, lambda: False)())


def _has_units(dtype: torch.dtype) -> bool:
    return any(map(_has, _UNITS[dtype]))


def has_tiles() -> bool:
    """Whether the processor multiplies whole tiles of bfloat16 (AMX), which `gemv` does not."""
    return _has("_is_amx_tile_supported")


def matrices(weights_EXY: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """A function from an expert to its weights (X, Y) in ``dtype``.

    Where they have to be converted all experts share one buffer: use a matrix before asking for the next.
    """
    if weights_EXY.dtype == dtype:
        return weights_EXY.__getitem__
    buffer_XY = empty(weights_EXY, weights_EXY.shape[1:], dtype)
    return lambda expert: buffer_XY.copy_(weights_EXY[expert])
