"""Parameter clustering: neurons whose input weights point the same way fire together.

Shapes: F neurons, R routed neurons, N routed experts, H model width.
"""

from __future__ import annotations

from torch.nn import functional as nnf

from monge.conversion.partition.balanced_kmeans import cluster_balanced
from monge.conversion.partition.neurons import neuron_energy, split_off, with_shared
from monge.conversion.types import ExpertShape, LayerSample, Partition


def cluster_weights(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Balanced k-means on the normalised rows of Wg (of Wu where there is no gate).

    Looks at weights only. The router is the centroids: an expert's logit is the mean over its neurons of
    ``x g_f / |g_f|``. The paper has no shared expert; here the neurons of largest energy
    ``mean_t w_t h^2 |Wd_f|^2`` are it.

    Source: MoEfication, arXiv 2110.01786, sections 3.2 (parameter clustering) and 3.3 (parameter centre).
    """
    weights = sample.weights
    rows_FH = weights.up_FH if weights.gate_FH is None else weights.gate_FH
    routed_R = split_off(neuron_energy(sample), shape)
    points_RH = nnf.normalize(rows_FH[routed_R], dim=1)
    labels_R, centroids_NH = cluster_balanced(points_RH, shape.routed, seed=seed)
    return Partition(with_shared(routed_R, labels_R, shape), router_NH=centroids_NH)
