"""A command on several processes: joined where torchrun started it; the first alone prints and reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined(device: str = "cpu") -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; yields whether this one prints.

    Args:
        device: that of the computation: gloo on CPUs, NCCL on GPUs, of which each process takes one.
    """
    if not dist.is_torchelastic_launched():
        yield True
        return
    kind = torch.device(device)
    if kind.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(dist.get_default_backend_for_device(kind))
    yield dist.get_rank() == 0
    dist.destroy_process_group()  # not after an error: torchrun ends what is left
