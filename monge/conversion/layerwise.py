"""Conversion of one layer in closed form: partition, router, refit.

    Observation --> LayerSample --> Partition --> router weight --> refitted projection --> ConvertedLayer

Shapes: T tokens, H model width, F neurons, N routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monge.conversion.building import chosen_gates, make_moe
from monge.conversion.calibrate import Observation
from monge.conversion.config import ConvertConfig
from monge.conversion.partition import METHODS
from monge.conversion.refit import CHUNK, LAMBDAS, Refit, refit_down, token_weights
from monge.conversion.router_fit import RidgeRouter, expert_energy, unit_logits
from monge.conversion.types import DROPPED, FFN, ExpertShape, FFNWeights, LayerSample, Partition

ALPHA = 0.5
"""Share of the drift of the residual stream that a layer is asked to undo. With 0 errors add up layer by
layer; with 1 the layers chase purely dense targets, and fine-tuned on few tokens they diverge."""
HELD_OUT = 8
"""One sequence in so many is held out to choose lambda."""


@dataclass(frozen=True)
class ConvertedLayer:
    """What one layer became.

    Attributes:
        weights: the dense FFN with the refitted projection, neurons in their old order.
        partition: the expert of each neuron.
        router_NH: weights of the logits z, of standard deviation 1 (empty for static pruning).
        refit: how well the layer does on held-out calibration tokens.
        load_N: share of the slots that each routed expert received, times N (1 is balanced).
    """

    weights: FFNWeights
    partition: Partition
    router_NH: Tensor
    shape: ExpertShape
    refit: Refit
    load_N: Tensor

    def install(self, ffn: FFN, gates: str) -> None:
        """Put it into the model: a `monge.MoE`, or the model's own modules, narrower."""
        if (self.partition.labels_F == DROPPED).any():
            kept = (self.partition.labels_F != DROPPED).nonzero().flatten()
            ffn.narrow(self.weights.select(kept))
        else:
            ffn.install(make_moe(self.weights, self.partition, self.shape, self.router_NH, gates=gates))


def convert_layer(
    seen: Observation,
    weights: FFNWeights,
    config: ConvertConfig,
    gates: str,
    *,
    layer: int,
    sequence: int,
    given: Partition | None = None,
    importance_CF: Tensor | None = None,
) -> tuple[ConvertedLayer, Tensor]:
    """Divide the FFN of one layer, fit its router and refit its projection.

    The target of the refit is ``t = y + alpha drift``: the dense FFN's output on the converted stream, plus
    half of what the stream has lost against the dense model's.

    Args:
        seen: its outputs, activations and drift are overwritten.
        gates: of the deployed model, a name of `monge.conversion.building.GATE_SCALES`.
        sequence: L, tokens of a sequence; every eighth sequence is held out from the refit to choose lambda.
        given: a partition with its router, found before; None finds them here.
        importance_CF: for methods that need gradients.

    Returns:
        The layer, and its outputs (T, H) on ``seen.x_TH``.
    """
    shape = config.shape_for(weights.neurons, layer)
    sample, target_TH = _sample(seen, weights, layer, importance_CF)
    partition = given or _divide(sample, shape, config)
    router_NH = _router_or_none(sample, partition)
    gates_TN = deployed_gates(seen.x_TH, router_NH, shape.top_k, gates)
    hidden_TF = sample.hidden_TF
    apply_gates(hidden_TF, gates_TN, partition.labels_F)

    refit = refit_down(
        hidden_TF,
        target_TH,
        sample.weight_T,
        held_out(len(hidden_TF), sequence).to(hidden_TF.device),
        weights.down_HF,
        lambdas=LAMBDAS if config.refit else (),
    )
    out_TH = torch.mm(hidden_TF, refit.down_HF.t(), out=seen.y_TH)
    if weights.down_bias_H is not None:
        out_TH += weights.down_bias_H
    slots_N = (gates_TN > 0).sum(0).double()
    converted = ConvertedLayer(
        weights=replace(weights, down_HF=refit.down_HF),
        partition=partition,
        router_NH=router_NH,
        shape=shape,
        refit=refit,
        load_N=slots_N / slots_N.mean(),
    )
    return converted, out_TH


def held_out(tokens: int, sequence: int) -> Tensor:
    """(T,) bool, every eighth sequence: the tokens that choose lambda."""
    return (torch.arange(tokens) // sequence) % HELD_OUT == HELD_OUT - 1


def divide_layer(
    seen: Observation,
    weights: FFNWeights,
    config: ConvertConfig,
    *,
    layer: int,
    importance_CF: Tensor | None = None,
) -> Partition:
    """Only the partition and the router of a layer."""
    sample, _ = _sample(seen, weights, layer, importance_CF)
    return _divide(sample, config.shape_for(weights.neurons, layer), config)


def deployed_gates(x_TH: Tensor, router_NH: Tensor, top_k: int, gates: str) -> Tensor:
    """(T, N) k' times the gates over the k' experts of largest z = x R^T (`chosen_gates`), else zero."""
    logits_TN = x_TH @ router_NH.t()
    if not len(router_NH):
        return logits_TN
    chosen = logits_TN.topk(top_k)
    weights_TK = top_k * chosen_gates(chosen.values, gates)
    return torch.zeros_like(logits_TN).scatter_(1, chosen.indices, weights_TK)


def apply_gates(hidden_TF: Tensor, gates_TN: Tensor, labels_F: Tensor) -> None:
    """Multiply every activation, in place, by the gate of its expert: 1 if shared, 0 if dropped."""
    routed_R = (labels_F >= 0).nonzero().flatten()
    hidden_TF[:, labels_F == DROPPED] = 0
    for start in range(0, len(hidden_TF), CHUNK):
        part = slice(start, start + CHUNK)
        hidden_TF[part, routed_R] *= gates_TN[part][:, labels_F[routed_R]]


def _sample(
    seen: Observation, weights: FFNWeights, layer: int, importance_CF: Tensor | None
) -> tuple[LayerSample, Tensor]:
    """What the partition method sees, and the target (T, H) of the refit, the output bias taken off.

    In the place of what was observed: one matrix (T, H) is 75 MB for SmolLM2 and 32,768 tokens.
    """
    y_TH = seen.y_TH if weights.down_bias_H is None else seen.y_TH.sub_(weights.down_bias_H)
    target_TH = y_TH if seen.drift_TH is None else seen.drift_TH.mul_(ALPHA).add_(y_TH)
    weight_T = token_weights(y_TH, target_TH)
    return LayerSample(layer, weights, seen.x_TH, seen.hidden_TF, weight_T, importance_CF), target_TH


def _divide(sample: LayerSample, shape: ExpertShape, config: ConvertConfig) -> Partition:
    """The partition of the configured method, its router fitted as configured, logits of deviation 1."""
    divide = METHODS[config.method].function
    if divide is None:
        raise ValueError(f"method {config.method!r} is learned through the whole model, not layer by layer")
    partition = divide(sample, shape, config.seed + sample.layer)
    if not (partition.labels_F >= 0).any():
        return partition
    if config.router == "analytic":
        router_NH = partition.router_NH
        if router_NH is None:
            known = ", ".join(name for name, method in METHODS.items() if method.analytic_router)
            raise ValueError(f"method {config.method!r} has no analytic router (those with one: {known})")
    else:
        energy_TN = expert_energy(sample, partition.labels_F, shape.routed)
        router_NH = RidgeRouter(sample.x_TH).fit(energy_TN.sqrt())
    return replace(partition, router_NH=unit_logits(router_NH, sample.x_TH))


def _router_or_none(sample: LayerSample, partition: Partition) -> Tensor:
    """(N, H), or (0, H) where nothing is routed."""
    if partition.router_NH is None:
        return sample.x_TH.new_zeros((0, sample.x_TH.shape[1]))
    return unit_logits(partition.router_NH, sample.x_TH)
