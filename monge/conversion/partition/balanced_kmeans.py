"""k-means with clusters of equal size, the tool of the clustering baselines.

Shapes: F points (neurons), D features, N clusters, L candidates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monge.ot import balanced_partition

ITERATIONS = 30


def cluster_balanced(
    points_FD: Tensor, clusters: int, *, seed: int = 0, initial_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's method on squared distances, the assignment step under equal sizes and exact.

    ``min sum_f |p_f - c_label(f)|^2  subject to cluster sizes that differ by at most one``

    Both steps lower the sum: for given centroids the labels are an optimal transport (`balanced_partition` of
    ``2 p c - |c|^2``), for given labels the best centroids are the means. It stops when no label changes, or
    after 30 iterations.

    Args:
        points_FD: (F, D) float.
        clusters: N, at most F.
        seed: of the initial centroids, points drawn by greedy k-means++ (the best of ``2 + ln N`` draws).
        initial_ND: initial centroids instead.

    Returns:
        Labels (F,) int64 in [0, N), and the centroids (N, D), the means of the clusters.

    Raises:
        ValueError: fewer points than clusters.

    Source: balanced assignment as in constrained k-means (Bradley, Bennett & Demiriz 2000); initialisation
        by Arthur & Vassilvitskii 2007.

    Examples:
        >>> import torch
        >>> from monge.conversion.partition.balanced_kmeans import cluster_balanced
        >>> points = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> labels, centroids = cluster_balanced(points, 2)
        >>> torch.bincount(labels).tolist(), bool(labels[0] == labels[2] != labels[3])
        ([3, 3], True)
        >>> sorted(round(float(c), 3) for c in centroids)
        [0.1, 5.1]
    """
    if not 1 <= clusters <= len(points_FD):
        raise ValueError(f"clusters must be in 1..{len(points_FD)}, the number of points; got {clusters}")
    centroids_ND = _spread_out(points_FD, clusters, seed) if initial_ND is None else initial_ND
    labels_F = balanced_partition(affinity(points_FD, centroids_ND))
    for _ in range(ITERATIONS):
        before_F = labels_F
        labels_F = balanced_partition(affinity(points_FD, _means(points_FD, labels_F, clusters)))
        if torch.equal(labels_F, before_F):
            break
    return labels_F, _means(points_FD, labels_F, clusters)


def affinity(points_FD: Tensor, centroids_ND: Tensor) -> Tensor:
    """(F, N): ``|p|^2`` minus the squared distance."""
    return 2 * (points_FD @ centroids_ND.T) - centroids_ND.square().sum(1)


def _means(points_FD: Tensor, labels_F: Tensor, clusters: int) -> Tensor:
    """(N, D). A gather per cluster is deterministic on every device, as an index_add would not be."""
    return torch.stack([points_FD[labels_F == label].mean(0) for label in range(clusters)])


def _spread_out(points_FD: Tensor, clusters: int, seed: int) -> Tensor:
    """(N, D) points, each drawn with probability proportional to its squared distance to those before it."""
    generator = torch.Generator().manual_seed(seed)
    candidates = 2 + int(math.log(clusters))
    squares_F = points_FD.square().sum(1)
    chosen = [int(torch.randint(len(points_FD), (1,), generator=generator))]
    nearest_F = torch.full_like(squares_F, torch.inf)
    draws_L = torch.tensor(chosen, device=points_FD.device)
    while True:
        distance_FL = squares_F[:, None] + squares_F[draws_L] - 2 * (points_FD @ points_FD[draws_L].T)
        distance_FL = torch.minimum(nearest_F[:, None], distance_FL.clamp_(min=0))
        best = int(distance_FL.sum(0).argmin())
        nearest_F = distance_FL[:, best]
        chosen[-1] = int(draws_L[best])
        if len(chosen) == clusters:
            return points_FD[chosen]
        # All points may lie on a chosen one: then any will do.
        odds_F = nearest_F.double().cpu() if bool(nearest_F.sum() > 0) else torch.ones(len(points_FD))
        draws_L = torch.multinomial(odds_F, candidates, replacement=True, generator=generator)
        draws_L = draws_L.to(points_FD.device)
        chosen.append(-1)
