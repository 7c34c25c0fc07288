"""Several gloo processes on this machine: `on_ranks` runs a function on each and collects the results."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)  # a deadlock fails the test


def on_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(*args)`` on every rank of a gloo group, one thread each; what they returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(ranks, folder, work, args), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=TIMEOUT)
    result = work(*args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    del result
    gc.collect()  # the group must not end with a DDP module: pytorch issue 56297
    dist.destroy_process_group()
