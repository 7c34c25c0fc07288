"""Tokens per second at prefill and at greedy decoding, of several models in turn, and the peak memory.

The models take turns, so that what disturbs the machine disturbs all of them; medians over the turns.

Shapes: L tokens of the prompt.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.evaluation.contenders import Contender
from monge.conversion.observer import Observer, Silent


@dataclass(frozen=True)
class Speed:
    """Medians over the turns.

    Attributes:
        prefill_tokens_per_s: tokens of the prompt per second, one sequence.
        decode_tokens_per_s: greedy tokens per second after it, one at a time, with cached keys and values.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_speed(
    models: Mapping[str, Contender],
    prompt_L: Tensor,
    *,
    decode: int = 32,
    turns: int = 3,
    observer: Observer | None = None,
) -> dict[str, Speed]:
    """Time every model on the same prompt; a first turn warms up and is not counted.

    Args:
        models: name -> causal language model of transformers, or how to have one (`contenders`).
        prompt_L: int64 token ids.
        decode: tokens to generate after the prompt.
        turns: how often each model is timed.
        observer: is told of every turn of every model.

    Raises:
        ValueError: an empty prompt, or ``decode`` or ``turns`` below 1.
    """
    if prompt_L.dim() != 1 or not len(prompt_L) or decode < 1 or turns < 1:
        raise ValueError(
            f"prompt_L must be (L >= 1,), decode and turns at least 1; got {tuple(prompt_L.shape)}, {decode} "
            f"and {turns}"
        )
    observer = observer or Silent()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            with nullcontext(model) if isinstance(model, nn.Module) else model() as ready:
                seconds = _timed(ready, prompt_L, decode)
            if turn:
                times[name].append(seconds)
            observer.advance()
    return {
        name: Speed(
            len(prompt_L) / statistics.median(prefill for prefill, _ in rows),
            decode / statistics.median(decoding for _, decoding in rows),
        )
        for name, rows in times.items()
    }


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, of all models in it together."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere


@torch.no_grad()
def _timed(model: Any, prompt_L: Tensor, decode: int) -> tuple[float, float]:
    """Seconds of the prefill and of ``decode`` greedy tokens."""
    model.eval()
    device = next(model.parameters()).device
    ids_1L = prompt_L[None].to(device)
    start = _now(device)
    out = model(input_ids=ids_1L, use_cache=True, logits_to_keep=1)
    middle = _now(device)
    for _ in range(decode):
        last_11 = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=last_11, past_key_values=out.past_key_values, use_cache=True)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
