"""Gradient importance: an expert for each cluster of tokens, made of the neurons that its loss depends on.

Shapes: F neurons, R routed neurons, N routed experts, C clusters of tokens (C = N here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from monge.conversion.partition.neurons import largest, split_off, with_shared
from monge.conversion.types import ExpertShape, LayerSample, Partition
from monge.ot import balanced_partition


def assign_by_importance(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Neurons to the token cluster to which they matter most, under equal sizes; ``seed`` plays no part.

    Importance is the first-order effect of removing a neuron, the mean of ``|h dL/dh|`` over the tokens of a
    cluster (`monge.conversion.importance`). The shared (in the paper: residual) expert holds the S neurons
    that are among the S most important of most clusters, of equals those of larger mean importance. The rest
    is an exact assignment of greatest total importance, where the paper takes the largest pairs first.

    Raises:
        ValueError: the sample has no importances, or not for as many clusters as there are routed experts.

    Source: LLaMA-MoE-v2, arXiv 2411.15708 (residual MLP MoE).
    """
    importance_CF = sample.importance_CF
    if importance_CF is None:
        raise ValueError("sample.importance_CF is missing: compute it with neuron_importance")
    if importance_CF.shape != (shape.routed, shape.neurons):
        raise ValueError(
            f"sample.importance_CF must be (routed experts, neurons) = {(shape.routed, shape.neurons)}, "
            f"got {tuple(importance_CF.shape)}: pass clusters={shape.routed} to neuron_importance"
        )
    routed_R = split_off(_agreement(importance_CF.double(), shape.shared_neurons), shape)
    labels_R = balanced_partition(importance_CF[:, routed_R].T)
    return Partition(with_shared(routed_R, labels_R, shape))


def _agreement(importance_CF: Tensor, count: int) -> Tensor:
    """(F,): the number of clusters that have neuron f among their top ``count``, plus a tie-break below 1."""
    top_F = importance_CF.new_zeros(importance_CF.shape[1])
    for importance_F in importance_CF:
        top_F[largest(importance_F, count)] += 1
    mean_F = importance_CF.mean(0)
    return top_F + mean_F / (2 * mean_F.max()).clamp(min=torch.finfo(mean_F.dtype).tiny)
