"""What fine-tuning leaves behind step by step, in memory and in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

TRACES = ("loss", "kl", "ce")


@dataclass
class FinetuneResult:
    """The course of a run, so far or in full.

    Attributes:
        identity: figures that tell this run from others with the same weights.
        loss, kl, ce: of every step, before its update, nats a token.
        selection: (step, perplexity on the selection text), in the order they were taken.
        best: copies of the weights that were best on it.
    """

    identity: list[float]
    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    selection: list[tuple[int, float]] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.loss)

    @property
    def chosen(self) -> int:
        """The step whose weights are kept: the best on the selection text, else the last."""
        return min(self.selection, key=lambda pair: pair[1])[0] if self.selection else self.steps

    def add(self, loss: float, kl: float, ce: float) -> None:
        """One more step."""
        for name, value in zip(TRACES, (loss, kl, ce)):
            getattr(self, name).append(value)

    def select(self, step: int, perplexity: float, parameters: list[nn.Parameter]) -> None:
        """Keep a copy of the weights if none were better."""
        self.selection.append((step, perplexity))
        if self.chosen == step:
            self.best = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore_best(self, parameters: list[nn.Parameter]) -> None:
        """Put the best weights back, where a selection was made."""
        for parameter, value in zip(parameters, self.best):
            parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        lists = {name: getattr(self, name) for name in (*TRACES, "identity", "selection")}
        numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()}
        return numbers | {f"best.{i}": weight for i, weight in enumerate(self.best)}

    def read(self, tensors: dict[str, Tensor], path: Path) -> None:
        """What `tensors` gave.

        Raises:
            ValueError: it is of another run.
        """
        if tensors["identity"].tolist() != self.identity:
            raise ValueError(
                f"the checkpoint {path} is of a run with other text or settings. Delete it to train this run "
                "from its beginning."
            )
        for name in TRACES:
            setattr(self, name, tensors[name].tolist())
        self.selection = [(int(step), value) for step, value in tensors["selection"].tolist()]
        self.best = [tensors[f"best.{i}"] for i in range(sum(name.startswith("best.") for name in tensors))]
