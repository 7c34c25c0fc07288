"""What the partition methods share: statistics of neurons, and the division into shared and routed ones.

Shapes: T tokens, B tokens of a block, F neurons, R routed neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monge.conversion.types import SHARED, ExpertShape, LayerSample

BLOCK = 1024
CLUSTERED_TOKENS = 4096
"""Tokens that neurons are clustered by: (F, T) is 300 MB in float32 for the 18,944 neurons of a 7B model."""


def some_tokens(sample: LayerSample, seed: int) -> Tensor:
    """Rising indices of all tokens, or of 4,096 drawn at random where there are more."""
    draw_T = torch.randperm(len(sample.hidden_TF), generator=torch.Generator().manual_seed(seed))
    return draw_T[:CLUSTERED_TOKENS].sort().values.to(sample.hidden_TF.device)


def token_mean(sample: LayerSample, function: Callable[[Tensor], Tensor]) -> Tensor:
    """(F,) float64: ``mean_t w_t function(h_t)``, a block of tokens at a time."""
    total_F = sample.hidden_TF.new_zeros(sample.hidden_TF.shape[1], dtype=torch.float64)
    for hidden_BF, weight_B in zip(sample.hidden_TF.split(BLOCK), sample.weight_T.split(BLOCK)):
        total_F += weight_B.double() @ function(hidden_BF).double()
    return total_F / len(sample.hidden_TF)


def neuron_energy(sample: LayerSample) -> Tensor:
    """(F,) float64: ``mean_t w_t h_tf^2 |Wd_f|^2``, what neuron f adds to the squared output on its own."""
    return token_mean(sample, torch.square) * sample.weights.down_HF.double().square().sum(0)


def largest(score_F: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores, the largest first; of equals the one with the lower index."""
    return torch.argsort(score_F, descending=True, stable=True)[:count]


def split_off(score_F: Tensor, shape: ExpertShape) -> Tensor:
    """(R,) rising indices of the neurons to route: all but the ``shape.shared_neurons`` of largest score.

    Raises:
        ValueError: not one score per neuron of ``shape``.
    """
    if score_F.shape != (shape.neurons,):
        raise ValueError(f"shape is for {shape.neurons} neurons, but the layer has {len(score_F)}")
    routed_F = torch.ones_like(score_F, dtype=torch.bool)
    routed_F[largest(score_F, shape.shared_neurons)] = False
    return routed_F.nonzero().flatten()


def with_shared(routed_R: Tensor, labels_R: Tensor, shape: ExpertShape) -> Tensor:
    """(F,) int64: ``labels_R`` at the neurons ``routed_R``, `SHARED` elsewhere."""
    labels_F = labels_R.new_full((shape.neurons,), SHARED)
    labels_F[routed_R] = labels_R
    return labels_F
