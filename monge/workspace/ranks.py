"""The processes of one job, as torchrun starts them: who writes, who waits, and what they average.

    first process: decides, writes, reports        all: their share of each batch, gradients averaged

One process is the case of size 1, in which nothing is exchanged. All processes see the same output folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(days=7)
"""Of processes that wait for what the first does alone; torchrun ends the job before when one dies."""
BUCKET = 2**22  # numbers in a message of gradients
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank, size: its number, and how many there are.
        waiting: the group in which they wait for each other.

    Examples:
        >>> from monge.workspace.ranks import ALONE, Ranks
        >>> Ranks(rank=1, size=2).share([5, 6, 7, 8]), ALONE.share([5, 6, 7, 8])
        ([6, 8], [5, 6, 7, 8])
    """

    rank: int = 0
    size: int = 1
    waiting: dist.ProcessGroup | None = None

    @classmethod
    def here(cls) -> Ranks:
        """All processes of the default group of ``torch.distributed``; one where there is none.

        All of them must call this together.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def check_batch(self, batch: int) -> None:
        """Raises ValueError where a batch cannot be divided evenly."""
        if batch % self.size:
            raise ValueError(
                f"batch={batch} does not divide among {self.size} processes, which share the sequences of a "
                f"step: let --batch be a multiple of {self.size}, or start another number of processes"
            )

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Those of this process: every size-th."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(group=self.waiting)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others do, which then find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def total(self, values: Tensor) -> Tensor:
        """Summed over the processes, on the CPU."""
        if self.size == 1:
            return values
        total = values.detach().cpu().clone()
        dist.all_reduce(total, group=self.waiting)
        return total

    def mean(self, values: Sequence[float]) -> list[float]:
        """Over the processes, float64, the same on all."""
        if self.size == 1:
            return list(values)
        return (self.total(torch.tensor(values, dtype=torch.float64)) / self.size).tolist()

    def decided(self, value: int) -> int:
        """The value that the first process has."""
        if self.size == 1:
            return value
        chosen = torch.tensor([value])
        dist.broadcast(chosen, 0, group=self.waiting)
        return int(chosen)

    def start_alike(self, tensors: Iterable[Tensor]) -> None:
        """Give ``tensors`` the values that they have in the first process."""
        if self.size > 1:
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor.detach(), 0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over the processes, in place; a parameter that got none anywhere keeps none.

        With equal shares of a batch and a loss that is a mean over tokens: the gradient of the whole batch.
        """
        if self.size == 1:
            return
        mine = list(parameters)
        used = torch.tensor([parameter.grad is not None for parameter in mine], dtype=torch.int32)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.waiting)
        for bucket in _buckets([p for p, anywhere in zip(mine, used.tolist()) if anywhere]):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            parts = flat.div_(self.size).split([grad.numel() for grad in grads])
            for parameter, part in zip(bucket, parts):
                parameter.grad = part.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, as many as fit into a message, of one dtype and device."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        alike = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(p.numel() for p in bucket) + parameter.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


ALONE = Ranks()
