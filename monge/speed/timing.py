"""Time several callables side by side on a noisy machine: interleaved in one run, medians, ratios.

Every candidate has its turn in every round, in an order that rotates from round to round, so a drift of the
machine's speed touches all of them alike. Absolute times are for orientation; the ratios are the result.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from monge.workspace import memory


def interleave(
    candidates: dict[str, Callable[[], object]],
    *,
    repeats: int = 7,
    least: float = 5e-3,
    warmup: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds per call of each candidate over ``repeats`` interleaved rounds.

    Uncounted rounds come first, for ``warmup`` seconds and at least one. In a round a candidate runs as often
    as it takes to fill ``least`` seconds, after one uncounted call: a short one would otherwise be timed with
    the caches that its neighbours left behind.

    On a busy machine and one thread ``clock=time.process_time`` leaves out the time that others had the core.
    """
    names = list(candidates)
    calls = dict.fromkeys(names, 1)  # per turn, set while warming up

    def turn(name: str) -> float:
        if calls[name] > 1:
            candidates[name]()
        start = clock()
        for _ in range(calls[name]):
            candidates[name]()
        return (clock() - start) / calls[name]

    began = time.perf_counter()
    while True:
        calls = {name: max(1, round(least / turn(name))) for name in names}
        if time.perf_counter() - began >= warmup:
            break
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(repeats):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(turn(name))
    return {name: statistics.median(values) for name, values in seconds.items()}


def clock_of(device: str) -> Callable[[], float]:
    """The time when all that was asked of the device so far is done, in seconds."""
    if torch.device(device).type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most memory during ``call`` over that before it, in bytes; what others freed is given back before.

    Resident memory on the CPU (Linux; 0 elsewhere), allocated memory on an accelerator.
    """
    gc.collect()
    memory.give_back()
    if not memory.reset_peak(device) or (before := memory.peak_bytes(device)) is None:
        return 0
    call()
    return max(0, (memory.peak_bytes(device) or 0) - before)
