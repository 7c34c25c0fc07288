"""Static structured pruning: the same neurons for every token, the baseline without a router.

Shapes: F neurons.
"""

from __future__ import annotations

import torch

from monge.conversion.partition.neurons import largest, token_mean
from monge.conversion.types import DROPPED, SHARED, ExpertShape, LayerSample, Partition


def keep_strongest(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Keep the neurons of largest ``mean_t w_t |h_tf| |Wd_f|``, drop the others; ``seed`` plays no part.

    As many are kept as a token of the MoE of the same ``shape`` would use: ``F active / groups``.

    Source: magnitude times activation as in Wanda, arXiv 2306.11695, equation 1, summed over a neuron's
        output weights.
    """
    score_F = token_mean(sample, torch.abs) * sample.weights.down_HF.double().norm(dim=0)
    if score_F.shape != (shape.neurons,):
        raise ValueError(f"shape is for {shape.neurons} neurons, but the layer has {len(score_F)}")
    kept = largest(score_F, round(shape.neurons * shape.active / shape.groups))
    labels_F = torch.full_like(score_F, DROPPED, dtype=torch.int64)
    labels_F[kept] = SHARED
    return Partition(labels_F)
