"""What a model is trained and measured on: inputs and targets, in batches whose order a seed decides.

Shapes: N examples (windows of text, or images).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.lab.config import ExperimentConfig


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs with their targets.

    Attributes:
        inputs_N: (N, S) int64 token ids, or (N, C, H, W) float32 images.
        targets_N: (N, S) int64, the next token of each, or (N,) int64 classes.
        domain_N: (N,) int64, which kind of text or image an example is; what experts may specialise in.
    """

    inputs_N: Tensor
    targets_N: Tensor
    domain_N: Tensor

    def __len__(self) -> int:
        return len(self.inputs_N)

    def take(self, rows: list[int] | slice | Tensor) -> Examples:
        """Some of the examples."""
        return Examples(self.inputs_N[rows], self.targets_N[rows], self.domain_N[rows])

    def batches(self, config: ExperimentConfig) -> Iterator[Examples]:
        """All in their order, in batches of the training size, on the device of the models."""
        for start in range(0, len(self), config.batch):
            yield self.take(slice(start, start + config.batch)).to(config.device)

    def to(self, device: str) -> Examples:
        """The same on a device."""
        return Examples(*(getattr(self, name).to(device) for name in ("inputs_N", "targets_N", "domain_N")))


class Data(Protocol):
    """The data of an experiment: `monge.lab.tokenizer.Corpus` of text, or `monge.lab.images.Images`."""

    @property
    def train(self) -> Examples:
        """What models are trained on."""

    @property
    def val(self) -> Examples:
        """What they are measured on; training never sees it."""

    @property
    def domain_names(self) -> list[str]:
        """Of `Examples.domain_N`."""

    @property
    def tokens_per_example(self) -> int:
        """Tokens that pass the routers for an example."""

    @property
    def halved(self) -> int:
        """The dimension of a batch of hidden states that `monge.lab.leak` halves: 1, the sequence, where the
        later tokens are not known in generation; 0, the batch, where images are classified one by one."""

    def robustness(self, model: nn.Module, config: ExperimentConfig) -> dict[str, Any]:
        """The fields of an ``eval`` record about corrupted inputs."""


Measured = Mapping[str, Mapping[str, float]]
"""Corruption -> strength, as text -> what was measured under it."""


def losses_of(model: nn.Module, batch: Examples) -> Tensor:
    """The cross-entropies (nats) of all targets, flat and with their gradient."""
    logits = model(batch.inputs_N).logits
    return F.cross_entropy(logits.flatten(0, -2), batch.targets_N.flatten(), reduction="none")


def window_examples(windows_NS: Tensor, domain_N: Tensor | None = None) -> Examples:
    """Windows of S + 1 tokens as inputs and their next tokens; one domain unless told otherwise."""
    if domain_N is None:
        domain_N = torch.zeros(len(windows_NS), dtype=torch.int64)
    return Examples(windows_NS[:, :-1], windows_NS[:, 1:], domain_N)
