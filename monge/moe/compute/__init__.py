"""How the experts are computed: one path a file, one signature, one table of names.

Every path is the same function (see `ComputePath`) of hidden states, a routing and the stacked expert
weights, and differs from the others in speed and peak memory only. To add one, write its forward and backward
in a file of its own, hand them to `differentiable`, and name it in `PATHS`.
"""

from __future__ import annotations

import torch

from monge.moe.compute.gemv import gemv
from monge.moe.compute.grouped_mm import grouped
from monge.moe.compute.loop import loop
from monge.moe.compute.operator import ComputePath
from monge.moe.compute.sorted import sorted_by_expert

PATHS: dict[str, ComputePath] = {
    "loop": loop,
    "sorted": sorted_by_expert,
    "gemv": gemv,
    "grouped_mm": grouped,
}

FEW_ROWS = {torch.float32: 16, torch.bfloat16: 32, torch.float64: 16}


def choose_path(num_slots: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> str:
    """What `auto` stands for: a fixed table by shape, dtype and device (benchmarks/moe_paths.py).

    Args:
        num_slots: T K. num_experts: E.
    """
    if device.type != "cpu":
        # nothing is read back from the device, where torch has a kernel for it
        return "grouped_mm" if device.type == "cuda" and dtype == torch.bfloat16 else "sorted"
    rows = num_slots / num_experts  # of an expert, on average
    return "gemv" if rows <= FEW_ROWS.get(dtype, 0) else "sorted"


__all__ = ["PATHS", "ComputePath", "choose_path"]
