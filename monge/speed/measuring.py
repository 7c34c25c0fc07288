"""The cases of `monge bench`, one record each.

Shapes: T tokens, K experts per token, E experts, H model width, I expert width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from monge.moe.compute import choose_path
from monge.speed.candidates import DENSE, candidates
from monge.speed.config import DTYPES, PHASES, TRAINING, TRAINING_TOKENS, SpeedConfig
from monge.speed.timing import clock_of, interleave, peak_bytes

Case = dict[str, Any]
"""What a record is known by; the figures are added to it."""


def cases(config: SpeedConfig) -> list[Case]:
    """All cases, in the order in which they are measured."""
    inference = [
        {"kind": "inference", "dtype": dtype, "experts": config.experts, "active": active, "phase": phase}
        for dtype, active, phase in product(config.dtypes, config.active, config.phases)
    ]
    training = [
        {"kind": "training", "dtype": dtype, "layer": layer}
        for dtype, layer in product(config.dtypes, config.layers)
    ]
    return inference + training


def measure_experts(config: SpeedConfig, case: Case) -> Case:
    """Time one of `cases`.

    Returns:
        The case with ``ms`` by candidate. Of inference also ``path``, the name that `choose_path` gives, and
        ``times_dense``, how many times faster than the dense FFN of E I neurons. Of training
        ``flops_of_dense``, the FLOP/s as a share of those of a dense FFN of K I neurons, and ``peak_bytes``
        of a step.
    """
    clock = time.process_time if config.cpu_time else clock_of(config.device)
    if case["kind"] == "inference":
        return case | _inference(config, case, clock)
    return case | _training(config, case, clock)


def _inference(config: SpeedConfig, case: Case, clock: Callable[[], float]) -> Case:
    H, I, E, K = config.dim, config.hidden, config.experts, case["active"]
    T, dtype = PHASES[case["phase"]], DTYPES[case["dtype"]]
    runs = candidates(H, I, E, K, T, dtype, E * I, config.device, backward=False)
    seconds = interleave(runs, repeats=config.repeats, clock=clock)
    return {
        "path": choose_path((T, K), (E, H, I), dtype, torch.device(config.device)),
        "ms": _milliseconds(seconds),
        "times_dense": _ratios(seconds),
    }


def _training(config: SpeedConfig, case: Case, clock: Callable[[], float]) -> Case:
    H, I, E, K = TRAINING[case["layer"]]
    dtype = DTYPES[case["dtype"]]
    for load in candidates(8, 8, E, K, TRAINING_TOKENS, dtype, 8, config.device, backward=True).values():
        load()  # the code, which takes memory too
    runs = candidates(H, I, E, K, TRAINING_TOKENS, dtype, K * I, config.device, backward=True)
    # before any step has kept memory for the next
    peaks = {name: peak_bytes(run, config.device) for name, run in runs.items()}
    seconds = interleave(runs, repeats=config.repeats, warmup=0.0, clock=clock)
    return {"ms": _milliseconds(seconds), "flops_of_dense": _ratios(seconds), "peak_bytes": peaks}


def remaining(config: SpeedConfig, done: list[Case]) -> Iterator[Case]:
    """The cases that no record tells of."""
    for case in cases(config):
        if not any(case.items() <= row.items() for row in done):
            yield case


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: 1000 * s for name, s in seconds.items()}


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {name: seconds[DENSE] / s for name, s in seconds.items()}
