"""How the experts are computed: one path a file, one signature, one table of names.

Every path is the same function (see `ComputePath`) of hidden states, a routing and the stacked expert
weights, and differs from the others in speed and peak memory only. To add one, write its forward and backward
in a file of its own, hand them to `differentiable`, and name it in `PATHS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from monge.moe.compute import precision
from monge.moe.compute.gemv import gemv
from monge.moe.compute.grouped_mm import grouped
from monge.moe.compute.loop import loop
from monge.moe.compute.masked import masked
from monge.moe.compute.operator import ComputePath
from monge.moe.compute.sorted import sorted_by_expert
from monge.moe.vectors import FAST_PRODUCTS

PATHS: dict[str, ComputePath] = {
    "loop": loop,
    "sorted": sorted_by_expert,
    "gemv": gemv,
    "grouped_mm": grouped,
    "masked": masked,
}

# CPU: rows per expert, on average, up to which `gemv` is at least as fast as `sorted`, from
# `python -m benchmarks.moe_paths`. With AVX2 or AVX-512 it is at any number, in float32 and bfloat16.
FEW_ROWS = {torch.float32: 48, torch.bfloat16: 48, torch.float64: 48}
FEW_ROWS_TILES = 4  # bfloat16 with AMX: decoding alone, where reading the weights is all; not measured
# Experts so small that Python around their products is most of `sorted`: up to 2^16 / H rows, at most 128
# (not in bfloat16).
SMALL, SMALL_ROWS, SMALL_INPUTS = 128, 128, 2**16

# Accelerators: up to how many activations of all experts, T E I, and multiply-adds of a product with them,
# T E I H, `masked` is the fastest, from `python -m benchmarks.moe_paths --device cuda`
FEW_ACTIVATIONS = 2**24
FEW_PRODUCTS = 2**35


def choose_path(
    routing: Sequence[int], experts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> str:
    """What `auto` stands for: a fixed table by shape, dtype and device.

    | device, dtype | rows per expert, T K / E | path |
    |---|---|---|
    | CPU with AVX2: float32, bfloat16 | any | `gemv` |
    | CPU with AMX: bfloat16 | up to 4 | `gemv` |
    | CPU: float64, and without AVX2 float32 and bfloat16 | up to 48 | `gemv` |
    | the same, experts of up to 128 neurons, not bfloat16 | up to 48, or min(128, 2^16 / H) | `gemv` |
    | CPU, more rows or another dtype | any | `sorted` |
    | accelerator: T E I up to 2^24, T E I H up to 2^35 | any | `masked` |
    | CUDA, more | any | `grouped_mm` |
    | another accelerator, more | any | `sorted` |

    Args:
        routing: T, K.
        experts: E, H, I.
    """
    (T, K), (E, H, I) = routing, experts
    slots, activations = T * K, T * E * I
    if device.type != "cpu":
        if activations <= FEW_ACTIVATIONS and activations * H <= FEW_PRODUCTS:
            return "masked"
        return "grouped_mm" if device.type == "cuda" else "sorted"
    few, narrow = FEW_ROWS.get(dtype, 0), dtype == torch.bfloat16
    if narrow and precision.has_tiles():
        few = FEW_ROWS_TILES
    elif FAST_PRODUCTS and dtype in (torch.float32, torch.bfloat16):
        return "gemv"
    elif few and not narrow and I <= SMALL:
        few = max(few, min(SMALL_ROWS, SMALL_INPUTS // H))
    return "gemv" if slots <= few * E else "sorted"


__all__ = ["PATHS", "ComputePath", "choose_path"]
