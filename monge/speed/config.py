"""What `monge bench` measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monge.workspace.machine import usable_cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PHASES = {"decode": 1, "32 tokens": 32, "prefill": 512}
"""Tokens of a forward: one of a text being written, a batch of such texts, a prompt."""
TRAINING = {"MoE(512, 1024, 16, 2)": (512, 1024, 16, 2), "MoE(1024, 2048, 64, 4)": (1024, 2048, 64, 4)}
"""Layers whose training step is measured: H, I, E, K."""
TRAINING_TOKENS = 2_048


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Sizes, data types and repetitions.

    Raises:
        ValueError: a size that cannot be; the message names it.
    """

    dim: int = 2048
    """H, width of the hidden states."""
    hidden: int = 128
    """I, neurons of an expert."""
    experts: int = 64
    """E, experts that a dense FFN of E I neurons is cut into."""
    active: tuple[int, ...] = (16, 32)
    """K, experts per token, one or more cases."""
    phases: tuple[str, ...] = tuple(PHASES)
    """Which of decode (1 token), '32 tokens', prefill (512 tokens)."""
    layers: tuple[str, ...] = tuple(TRAINING)
    """Layers whose training step of 2,048 tokens is measured; none skips it."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """Data types: float32, bfloat16."""
    repeats: int = 7
    """Interleaved rounds of a case; the median counts."""
    prompt: int = 512
    """Tokens of the prompt of a whole model."""
    decode: int = 64
    """Tokens that a whole model writes."""
    device: str = "cpu"
    """Where to compute: a torch device such as cpu or cuda."""
    threads: int = usable_cores()
    """Threads of the computation."""
    cpu_time: bool = False
    """Count the CPU time of one thread: for a machine that others use too."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "experts", "repeats", "prompt", "decode", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cpu_time and self.device != "cpu":
            raise ValueError(f"cpu_time counts the time of a thread, not that of device {self.device!r}")
        if wrong := [k for k in self.active if not 1 <= k <= self.experts]:
            raise ValueError(f"active must be in 1..{self.experts}, the number of experts; got {wrong}")
        for name, known in (("phases", PHASES), ("layers", TRAINING), ("dtypes", DTYPES)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name} has {unknown}; known: {', '.join(known)}")
