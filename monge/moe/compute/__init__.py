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

SMALL_GATHER = 2 * 2**20  # bytes


def choose_path(num_slots: int, dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """What `auto` stands for: a fixed table by shape, dtype and device (benchmarks/moe_paths.py).

    On the CPU `grouped_mm` spares the Python of one call per expert, but it gathers the rows of all experts
    at once; `sorted` gathers those of one, which stay in the cache. The first is up to 20% faster while all
    rows fit into `SMALL_GATHER`, the second by as much when they do not, and in float64, for which torch has
    no kernel. On an accelerator `grouped_mm` reads nothing back, where torch has a kernel for it: bfloat16 on
    CUDA.

    Args:
        num_slots: T K. dim: H.
    """
    if device.type != "cpu":
        return "grouped_mm" if device.type == "cuda" and dtype == torch.bfloat16 else "sorted"
    small = num_slots * dim * dtype.itemsize <= SMALL_GATHER
    return "grouped_mm" if small and dtype != torch.float64 else "sorted"


__all__ = ["PATHS", "ComputePath", "choose_path"]
