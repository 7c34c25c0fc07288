"""CMoE: neurons that are often among a token's strongest are shared, the rest clustered by when they are.

Shapes: T tokens, K marks per token, F neurons, R routed neurons, N routed experts.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as nnf

from monge.conversion.partition.balanced_kmeans import cluster_balanced
from monge.conversion.partition.neurons import largest, some_tokens, split_off, with_shared
from monge.conversion.types import ExpertShape, LayerSample, Partition

MARKED = 0.1
"""Share of the neurons that a token marks. The paper marks 10 of 11,008, with which most markers are empty on
SmolLM2: the error of layer 13 is 13 % higher with 10 of 1,536."""


def carve_experts(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Clusters of binary activation markers, on at most 4,096 tokens.

    A token marks the tenth of its neurons with the largest ``|h|``. The neurons marked most often form the
    shared expert. The others are clustered by their markers: balanced, squared distances, started from the N
    neurons marked most often. ``seed`` plays a part only where there are more tokens.

    The paper's router logit is ``|h|`` of the neuron nearest the centroid of each cluster. A standard router
    is linear: this one keeps the neuron's gate row (up row without a gate), which chooses as well on
    SmolLM2. Nearest is meant by angle: by distance it is a neuron that hardly ever fires, since the mean of
    sparse markers is close to zero, and the router is then hardly better than chance.

    Source: CMoE, arXiv 2502.04416, section 3.
    """
    weights = sample.weights
    hidden_TF = sample.hidden_TF[some_tokens(sample, seed)]
    marked = math.ceil(MARKED * hidden_TF.shape[1])
    strongest_TK = hidden_TF.abs().topk(marked, dim=1).indices
    markers_TF = torch.zeros_like(hidden_TF).scatter_(1, strongest_TK, 1.0)
    rate_F = markers_TF.mean(0)
    routed_R = split_off(rate_F, shape)
    markers_RT = markers_TF[:, routed_R].T.contiguous()
    first_N = largest(rate_F[routed_R], shape.routed)
    labels_R, centroids_NT = cluster_balanced(markers_RT, shape.routed, initial_ND=markers_RT[first_N])

    cosine_RN = nnf.normalize(markers_RT, dim=1) @ nnf.normalize(centroids_NT, dim=1).T
    cosine_RN[nnf.one_hot(labels_R, shape.routed) == 0] = -torch.inf
    nearest_N = routed_R[cosine_RN.argmax(0)]
    rows_FH = weights.up_FH if weights.gate_FH is None else weights.gate_FH
    return Partition(with_shared(routed_R, labels_R, shape), router_NH=rows_FH[nearest_N])
