"""k-means under equal sizes: the objective falls, small cases are solved, degenerate points do no harm."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monge.conversion.partition import balanced_kmeans
from monge.conversion.partition.balanced_kmeans import cluster_balanced


def spread(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum of squared distances to the mean of the own cluster."""
    groups = [points[labels == label].double() for label in labels.unique()]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60)
def test_sizes_centroids_and_determinism(points, clusters, features, seed):
    clusters = min(clusters, points)
    draw = torch.Generator().manual_seed(seed)
    points_FD = torch.randint(-2, 3, (points, features), generator=draw).float()  # many duplicates
    labels, centroids = cluster_balanced(points_FD, clusters, seed=seed)
    sizes = torch.bincount(labels, minlength=clusters)
    assert len(sizes) == clusters
    assert int(sizes.max() - sizes.min()) <= 1
    for label in range(clusters):
        torch.testing.assert_close(centroids[label], points_FD[labels == label].mean(0))
    again = cluster_balanced(points_FD, clusters, seed=seed)
    assert torch.equal(labels, again[0])
    assert torch.equal(centroids, again[1])


def test_every_iteration_lowers_the_spread(monkeypatch):
    points = torch.randn(61, 4, generator=torch.Generator().manual_seed(0))
    spreads = []
    for iterations in range(8):
        monkeypatch.setattr(balanced_kmeans, "ITERATIONS", iterations)
        spreads.append(spread(points, cluster_balanced(points, 5, seed=1)[0]))
    assert all(after <= before + 1e-4 for before, after in pairwise(spreads))
    assert spreads[-1] < spreads[0] - 1


def test_the_best_of_some_seeds_is_the_best_of_all_partitions():
    points = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    best = min(spread(points, torch.tensor(labels)) for labels in set(permutations([0, 0, 1, 1, 2, 2])))
    found = [spread(points, cluster_balanced(points, 3, seed=seed)[0]) for seed in range(10)]
    assert min(found) == pytest.approx(best, rel=1e-5)


def test_the_initial_centroids_are_used():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    for initial in ([[0.0], [10.0]], [[10.0], [0.0]]):
        labels, centroids = cluster_balanced(points, 2, initial_ND=torch.tensor(initial))
        assert labels.tolist() == ([0, 0, 1, 1] if initial[0] == [0.0] else [1, 1, 0, 0])
        assert centroids.flatten().sort().values.tolist() == [0.5, 10.5]


@pytest.mark.parametrize("clusters", [0, 4])
def test_more_clusters_than_points_are_refused(clusters):
    with pytest.raises(ValueError, match=r"clusters must be in 1\.\.3"):
        cluster_balanced(torch.zeros(3, 2), clusters)
