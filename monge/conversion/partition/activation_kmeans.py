"""Activation clustering: neurons that fire on the same tokens go to the same expert.

Shapes: T tokens, F neurons, R routed neurons.
"""

from __future__ import annotations

from torch.nn import functional as nnf

from monge.conversion.partition.balanced_kmeans import cluster_balanced
from monge.conversion.partition.neurons import neuron_energy, some_tokens, split_off, with_shared
from monge.conversion.types import ExpertShape, LayerSample, Partition


def cluster_activations(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Balanced k-means on the normalised columns of ``sqrt(w) |h|``, on at most 4,096 tokens.

    The inner product of two such columns is the (weighted) cosine between the loudness of two neurons, so
    that a cluster is a set of neurons that fire together, whatever their sign and scale. The shared expert
    holds the neurons of largest energy ``mean_t w_t h^2 |Wd_f|^2``.

    Source: the co-activation split of MoEfication, arXiv 2110.01786, section 3.2, with balanced k-means in
        place of graph partitioning.
    """
    routed_R = split_off(neuron_energy(sample), shape)
    tokens_T = some_tokens(sample, seed)
    loudness_TR = sample.hidden_TF[tokens_T][:, routed_R].abs_()
    loudness_TR *= sample.weight_T[tokens_T, None].sqrt()
    labels_R, _ = cluster_balanced(nnf.normalize(loudness_TR.T.contiguous(), dim=1), shape.routed, seed=seed)
    return Partition(with_shared(routed_R, labels_R, shape))
