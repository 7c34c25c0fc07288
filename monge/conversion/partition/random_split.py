"""Random split: the control that every other partition must beat.

Shapes: F neurons, R routed neurons.
"""

from __future__ import annotations

import torch

from monge.conversion.partition.neurons import split_off, with_shared
from monge.conversion.types import ExpertShape, LayerSample, Partition


def split_at_random(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Neurons to experts, and to the shared expert, by lot.

    Source: the independent random split of LLaMA-MoE, arXiv 2406.16554, section 3.1.
    """
    generator = torch.Generator().manual_seed(seed)
    device = sample.weights.up_FH.device
    lot_F = torch.rand(sample.weights.neurons, generator=generator, dtype=torch.float64).to(device)
    routed_R = split_off(lot_F, shape)
    dealt_R = torch.arange(len(routed_R)) % shape.routed
    labels_R = dealt_R[torch.randperm(len(routed_R), generator=generator)].to(device)
    return Partition(with_shared(routed_R, labels_R, shape))
