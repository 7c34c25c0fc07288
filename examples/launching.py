"""What both examples need under torchrun: a process group on any device, and checkpoints that survive.

`job` joins the processes and explains the end of a job that lost one. `Checkpoints` writes with
torch.distributed.checkpoint into a folder that gets its name only when every process is done, so that the
last checkpoint is whole whenever a process dies, and loads it into any number of processes.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "nccl", "gloo", "socket", "broken pipe")


@contextmanager
def job(out: Path, timeout_s: float) -> Iterator[torch.device]:
    """Join the processes that torchrun started; the device of this one.

    A DistributedDataParallel module must not outlive the block: it would take the process group with it,
    and then wait for threads that wait for the interpreter (pytorch issue 56297), seldom, but forever.

    A process that dies, or that is silent for ``timeout_s`` seconds, ends the job: the others say so, with
    the checkpoint from which the same command goes on, and exit with status 1, whether they notice it by
    themselves or torchrun, which then ends what is left, does so first.
    """
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    lost = f"another process died, or was silent for more than {timeout_s:g} s"
    signal.signal(signal.SIGTERM, lambda *_: _stop(out, f"torchrun ends the job, as it does when {lost}"))
    try:
        yield device
        gc.collect()  # DDP in a cycle of references is to go before the group, too
        dist.barrier()
    except RuntimeError as error:
        reason = str(error)
        if not any(word in reason.lower() for word in LOST):
            raise
        _stop(out, f"{lost} ({reason.splitlines()[0]})")
    dist.destroy_process_group()


def _stop(out: Path, why: str) -> NoReturn:
    """Say why, and from where to go on, and end this process."""
    last = Checkpoints(out).latest()
    goes_on = f"The last checkpoint is {last}: the same command goes on from there." if last else ""
    print(f"Process {dist.get_rank()} stops: {why}. {goes_on}", file=sys.stderr, flush=True)
    os._exit(1)  # a process group that lost a member cannot be shut down in order


def new_group(timeout_s: float) -> dist.ProcessGroup:
    """All processes once more, for messages of their own, as patient as the job and not half an hour."""
    return dist.new_group(timeout=timedelta(seconds=timeout_s))


class Checkpoints:
    """Folders ``step-N`` in ``out``, of which the last one is kept.

    Args:
        out: a folder that all processes see.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def latest(self) -> Path | None:
        """The last whole checkpoint."""
        found = [path for path in self.out.glob("step-*") if path.name[5:].isdigit()]
        return max(found, key=_step_of, default=None)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state after ``step`` steps; all processes call it."""
        unfinished, last = self.out / "unfinished", self.latest()
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        dist.barrier()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)
        dist.barrier()
        if dist.get_rank() == 0:
            unfinished.rename(self.out / f"step-{step}")
            if last is not None:
                shutil.rmtree(last)
        dist.barrier()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore the last checkpoint, however many processes wrote it; returns its step, 0 for none."""
        last = self.latest()
        if last is None:
            return 0
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=last)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return _step_of(last)


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a scalar over all processes."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def say(text: str) -> None:
    """Print once, not once per process."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def _step_of(path: Path) -> int:
    return int(path.name[5:])
