"""Layers for the partition tests: random ones, and ones whose neurons fall into known groups."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from monge.conversion.types import SHARED, FFNWeights, LayerSample


def random_sample(
    neurons: int, routed: int, *, tokens: int = 32, width: int = 8, gated: bool = True, seed: int = 0
) -> LayerSample:
    draw = torch.Generator().manual_seed(seed)
    weights = FFNWeights(
        activation="swiglu" if gated else "gelu",
        up_FH=torch.randn(neurons, width, generator=draw),
        down_HF=torch.randn(width, neurons, generator=draw),
        gate_FH=torch.randn(neurons, width, generator=draw) if gated else None,
    )
    x_TH = torch.randn(tokens, width, generator=draw)
    weight_T = torch.rand(tokens, generator=draw) + 0.1
    return LayerSample(
        layer=0,
        weights=weights,
        x_TH=x_TH,
        hidden_TF=weights.hidden(x_TH),
        weight_T=weight_T / weight_T.mean(),
        importance_CF=torch.rand(routed, neurons, generator=draw),
    )


def grouped_sample(
    *, groups: int, size: int, shared: int, tokens: int = 600, width: int = 40, seed: int = 0
) -> tuple[LayerSample, Tensor]:
    """A layer of ``groups`` groups of ``size`` neurons in random order, and the group of each neuron.

    Routed groups have a direction each: their gates point there, and a token that points there sets them off.
    The neurons of the ``shared`` groups, marked `SHARED`, fire strongly on every token.
    """
    draw = torch.Generator().manual_seed(seed)
    routed = groups - shared
    directions = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q[: routed + 1]
    always, directions = directions[0], directions[1:]
    planted = torch.arange(groups).repeat_interleave(size) - shared
    planted = planted.clamp(min=SHARED)[torch.randperm(groups * size, generator=draw)]
    neurons = len(planted)

    topic_T = torch.arange(tokens) % routed
    topic_T = topic_T[torch.randperm(tokens, generator=draw)]
    x_TH = 3 * directions[topic_T] + always + 0.05 * torch.randn(tokens, width, generator=draw)
    gate_FH = 4 * torch.where((planted == SHARED)[:, None], 3 * always, directions[planted.clamp(min=0)])
    up_FH = always * (0.5 + torch.rand(neurons, 1, generator=draw))
    up_FH[planted == SHARED] *= 4
    noise = 0.05 * torch.randn(2, neurons, width, generator=draw)
    weights = FFNWeights(
        "swiglu", up_FH + noise[0], torch.randn(width, neurons, generator=draw), gate_FH + noise[1]
    )
    weights.down_HF.div_(weights.down_HF.norm(dim=0))
    hidden_TF = weights.hidden(x_TH)
    effect_TF = hidden_TF.abs()
    importance_CF = torch.stack([effect_TF[topic_T == topic].mean(0) for topic in range(routed)])
    return LayerSample(0, weights, x_TH, hidden_TF, torch.ones(tokens), importance_CF), planted


def permuted(sample: LayerSample, order_F: Tensor) -> LayerSample:
    """The same layer, its neurons renumbered."""
    assert sample.importance_CF is not None
    return replace(
        sample,
        weights=sample.weights.select(order_F),
        hidden_TF=sample.hidden_TF[:, order_F],
        importance_CF=sample.importance_CF[:, order_F],
    )


def recovered(labels_F: Tensor, planted_F: Tensor) -> float:
    """The largest share of routed neurons with the planted group, over all names of the labels."""
    from scipy.optimize import linear_sum_assignment

    routed = (labels_F >= 0) & (planted_F >= 0)
    count = int(max(labels_F.max(), planted_F.max())) + 1
    table = torch.zeros(count, count)
    table.index_put_((labels_F[routed], planted_F[routed]), torch.ones(()), accumulate=True)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table[rows, columns].sum() / (planted_F >= 0).sum())
