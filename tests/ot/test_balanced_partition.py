"""``balanced_partition`` against linear programs with both bounds on the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import best_partition

from monge.ot import balanced_partition


def check(affinity: torch.Tensor, labels: torch.Tensor) -> float:
    F, E = affinity.shape
    assert labels.shape == (F,)
    assert labels.dtype == torch.int64
    sizes = torch.bincount(labels, minlength=E)
    assert sizes.shape == (E,)
    assert int(sizes.min()) >= F // E
    assert int(sizes.max()) <= -(-F // E)
    return float(affinity.double().gather(1, labels[:, None]).sum())


@pytest.mark.parametrize(
    ("F", "E"),
    [(12, 4), (13, 4), (15, 4), (7, 7), (3, 5), (1, 4), (9, 1), (29, 6), (64, 9), (50, 16), (0, 3)],
)
@pytest.mark.parametrize("family", ["normal", "skewed", "one column", "integer", "equal"])
def test_sizes_and_optimality(F, E, family):
    affinity = {
        "normal": torch.randn(F, E),
        "skewed": torch.randn(F, E) + 3 * torch.randn(E),
        "one column": torch.randn(F, E) + 9 * torch.eye(E)[0],  # every row wants column 0
        "integer": torch.randint(0, 3, (F, E)).float(),
        "equal": torch.ones(F, E),
    }[family]
    best = best_partition(affinity)
    assert check(affinity, balanced_partition(affinity)) == pytest.approx(best, rel=1e-7, abs=1e-6)
    assert check(affinity, balanced_partition(affinity, method="greedy")) <= best + 1e-6 * abs(best) + 1e-6


@given(st.data())
@settings(max_examples=80)
def test_columns_short_of_the_floor_are_raised_optimally(data):
    # Few wanted columns: the plain assignment with capacity ceil(F / E) leaves the others short.
    E = data.draw(st.integers(2, 7))
    F = data.draw(st.integers(E, 22))
    entry = st.integers(-4, 4).map(float)
    rows = data.draw(st.lists(st.lists(entry, min_size=E, max_size=E), min_size=F, max_size=F))
    pull = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 10.0]), min_size=E, max_size=E)))
    affinity = torch.tensor(rows) + pull
    assert check(affinity, balanced_partition(affinity)) == pytest.approx(best_partition(affinity), abs=1e-6)


def test_forbidden_pairs_are_respected_with_a_floor():
    generator = torch.Generator().manual_seed(1)
    solved = 0
    for _ in range(40):
        affinity = torch.randn(11, 4, generator=generator) + 3 * torch.randn(4, generator=generator)
        affinity[torch.rand(11, 4, generator=generator) < 0.3] = -torch.inf
        best = best_partition(affinity)
        if best == -torch.inf:
            with pytest.raises(ValueError, match=r"no (balanced )?partition"):
                balanced_partition(affinity)
            continue
        solved += 1
        assert check(affinity, balanced_partition(affinity)) == pytest.approx(best, abs=1e-5)
    assert solved > 20


def test_an_unreachable_floor_is_refused():
    affinity = torch.zeros(7, 3)
    affinity[:6, 2] = -torch.inf  # column 2 needs two rows, one may take it
    with pytest.raises(ValueError, match="at least 2 rows per column"):
        balanced_partition(affinity)


def test_rounding_a_soft_plan_beats_greedy():
    affinity = torch.log_softmax(2 * torch.randn(1024, 16), -1)
    exact, greedy = (check(affinity, balanced_partition(affinity, method=m)) for m in ("exact", "greedy"))
    assert exact > greedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_and_gradients(dtype):
    affinity = torch.randn(10, 3).to(dtype).requires_grad_()
    labels = balanced_partition(affinity)
    assert check(affinity.detach(), labels) == pytest.approx(best_partition(affinity), abs=1e-6)
    assert not labels.requires_grad


@pytest.mark.parametrize(
    ("affinity", "method", "message"),
    [
        (torch.zeros(4), "exact", r"affinity_FE must be a floating-point matrix .* got torch.float32 \(4,\)"),
        (torch.zeros(4, 0), "exact", "E >= 1"),
        (torch.zeros(4, 2, dtype=torch.int64), "exact", "torch.int64"),
        (torch.zeros(4, 2), "approximate", "method must be exact or greedy, got 'approximate'"),
        (torch.tensor([[0.0, torch.nan]]), "exact", r"NaN or \+inf"),
        (torch.full((4, 2), -torch.inf), "exact", "no balanced partition"),
    ],
)
def test_bad_arguments(affinity, method, message):
    with pytest.raises(ValueError, match=message):
        balanced_partition(affinity, method=method)


def test_wrong_kind_of_object():
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        balanced_partition([[1.0]])
