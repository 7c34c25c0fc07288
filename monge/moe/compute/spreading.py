"""Give the experts to threads: each to one, whose matrix products then run on that thread alone.

128 rows by 256 are too few for a product on two threads: one expert a thread is a third faster there, and as
fast with ten times the weights (docs/performance.md). It pays where no expert has more rows than the equal
share of a thread; otherwise, and where torch's threads are out of reach, experts take their turns, and all
threads work on each.

Shapes: T tokens, H width, n rows of one expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from monge.moe.compute.slot_sum import SlotSum
from monge.moe.dispatch import Slots
from monge.ot.threads import on_torch_threads, torch_threads

Run = Callable[[int, slice, Tensor | None, bool], None]
"""Computes one expert: its number, its rows, where to write what is summed into the tokens (n, H), and
whether this thread has it to itself."""


def run_experts(slots: Slots, slot_sum: SlotSum | None, make: Callable[[], Run]) -> None:
    """Call what ``make`` returns for every expert, also for those with no rows.

    Args:
        slot_sum: gets the values of all rows; None if there is nothing to sum.
        make: called once for every thread that takes part: buffers are a thread's own.
    """
    idle: list[Run] = []
    threads = torch_threads(slots.starts_E1.device)
    for experts in _rounds(slots, slot_sum):
        sizes = [rows.stop - rows.start for _, rows, _ in experts]
        spread = threads > 1 and threads * max(sizes) <= sum(sizes)
        alone = spread or torch.get_num_threads() == 1
        if spread:  # the largest first, so that threads end together
            experts.sort(key=lambda expert: expert[1].start - expert[1].stop)
        left = iter(experts)  # whose steps are one at a time, under the interpreter lock

        def work(left: Iterable[tuple[int, slice, Tensor | None]] = left, alone: bool = alone) -> None:
            run = idle.pop() if idle else make()
            for expert in left:
                run(*expert, alone)
            idle.append(run)

        if spread:
            on_torch_threads(work, threads)
        else:
            work()


def _rounds(slots: Slots, slot_sum: SlotSum | None) -> Iterator[list[tuple[int, slice, Tensor | None]]]:
    """The experts in the groups that the sum has place for. Reads the edges from the device, once."""
    edges = slots.starts_E1.tolist()
    experts = [(e, slice(*ends)) for e, ends in enumerate(itertools.pairwise(edges))]
    if slot_sum is not None:
        yield from slot_sum.rounds(experts)
    else:
        yield [(e, rows, None) for e, rows in experts]
