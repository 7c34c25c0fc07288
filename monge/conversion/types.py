"""What the stages of a conversion hand to each other.

    FFN.read() --> FFNWeights --> LayerSample --> Partition --> router weight --> MoE (installed by the FFN)

Shapes: T tokens, H model width, F neurons of the dense FFN, N routed experts, C clusters of tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.moe.activations import ACTIVATIONS

SHARED = -1
"""Label of a neuron that every token uses."""
DROPPED = -2
"""Label of a neuron that is removed (static pruning)."""


@dataclass(frozen=True)
class FFNWeights:
    """A dense FFN, ``y = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd``.

    Without a gate ``y = act(x Wu^T + bu) Wd^T + bd``. All tensors share one dtype and device.
    ``activation`` is a name of `monge.moe.activations.ACTIVATIONS`.
    """

    activation: str
    up_FH: Tensor
    down_HF: Tensor
    gate_FH: Tensor | None = None
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_H: Tensor | None = None

    @property
    def neurons(self) -> int:
        """F."""
        return self.up_FH.shape[0]

    @property
    def matrix_parameters(self) -> int:
        """Parameters of the projections, without biases."""
        return sum(w.numel() for w in (self.gate_FH, self.up_FH, self.down_HF) if w is not None)

    def hidden(self, x_TH: Tensor) -> Tensor:
        """The activations h (T, F), before Wd."""
        up_TF = nnf.linear(x_TH, self.up_FH, self.up_bias_F)
        function = ACTIVATIONS[self.activation].function
        if self.gate_FH is None:
            return function(up_TF)
        return function(nnf.linear(x_TH, self.gate_FH, self.gate_bias_F)) * up_TF

    def __call__(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        return nnf.linear(self.hidden(x_TH), self.down_HF, self.down_bias_H)

    def select(self, neurons: Tensor) -> FFNWeights:
        """The same FFN with only the neurons at ``neurons`` (int64 indices), in that order."""
        rows = ("up_FH", "gate_FH", "gate_bias_F", "up_bias_F")
        picked = {name: value[neurons] for name in rows if (value := getattr(self, name)) is not None}
        picked["down_HF"] = self.down_HF[:, neurons]
        return replace(self, **picked)  # type: ignore[arg-type]

    def to(self, place: torch.dtype | torch.device) -> FFNWeights:
        """Every tensor through ``Tensor.to(place)``."""
        moved = {f.name: v.to(place) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]


class FFN(Protocol):
    """One feed-forward network of a model, wherever its projections sit (`monge.conversion.ffn`)."""

    @property
    def name(self) -> str:
        """Path of the module in the model, for messages and records."""

    @property
    def layer(self) -> int:
        """Index of the layer that holds it."""

    @property
    def input_module(self) -> nn.Module:
        """Its forward takes x (..., H) as first argument."""

    @property
    def output_module(self) -> nn.Module:
        """Its forward returns y (..., H); the same module as ``input_module`` for gated FFNs."""

    @property
    def down_module(self) -> nn.Module:
        """Its last projection, a linear map that is given the activations h (..., F)."""

    def in_memory(self) -> AbstractContextManager[None]:
        """The weights of its layer are in memory meanwhile (`monge.conversion.on_disk`)."""

    def read(self) -> FFNWeights:
        """A copy of the dense weights, float32; sizes without values where the layer lies on disk."""

    def install(self, module: nn.Module) -> None:
        """Let ``module``, (..., H) -> (..., H), take the FFN's place in the model."""

    def narrow(self, weights: FFNWeights) -> None:
        """Put a narrower dense FFN into the model's own modules."""


class ExpertShape(NamedTuple):
    """How the F neurons of a layer are divided: ``groups`` equal groups, ``shared`` of them always on.

    ``groups - shared`` routed experts remain, of which a token takes ``active - shared``. Sizes of groups
    differ by at most one neuron where ``groups`` does not divide F.
    """

    neurons: int
    groups: int
    active: int
    shared: int

    @property
    def routed(self) -> int:
        """N, the number of routed experts."""
        return self.groups - self.shared

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return self.active - self.shared

    @property
    def shared_neurons(self) -> int:
        """Neurons of the shared expert."""
        return round(self.neurons * self.shared / self.groups)

    @property
    def expert_neurons(self) -> int:
        """I, neurons of the largest routed expert; smaller ones are padded with zero neurons."""
        return -(-(self.neurons - self.shared_neurons) // max(self.routed, 1))


@dataclass(frozen=True)
class LayerSample:
    """What a partition method may look at: one layer on the calibration tokens."""

    layer: int
    weights: FFNWeights
    x_TH: Tensor
    """Inputs of the FFN, float32."""
    hidden_TF: Tensor
    """Its activations h on them, float32."""
    weight_T: Tensor
    """Weight of each token in sums over tokens, mean 1."""
    importance_CF: Tensor | None = None
    """Mean |h dL/dh| per cluster of tokens, for the methods that need gradients."""


@dataclass(frozen=True)
class Partition:
    """Which expert each neuron went to.

    Attributes:
        labels_F: int64 in [0, N), `SHARED` or `DROPPED`.
        router_NH: the method's own analytic router (logits are ``x @ router.T``), or None.
    """

    labels_F: Tensor
    router_NH: Tensor | None = None


class PartitionMethod(Protocol):
    """``partition(sample, shape, seed)``: deterministic for equal arguments at the same thread count."""

    def __call__(self, sample: LayerSample, shape: ExpertShape, seed: int) -> Partition: ...
