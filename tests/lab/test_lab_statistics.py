"""Intervals against SciPy, mutual information against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mutual_info_score

from monge.lab.paired import paired_difference, t_quantile
from monge.lab.specialisation import mutual_information


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_quantiles_are_students(level):
    for freedom in range(1, 60):
        expected = stats.t.ppf((1 + level) / 2, freedom)
        assert t_quantile(freedom, level) == pytest.approx(expected, rel=1e-9), freedom


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=9))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    a, b = ({seed: pair[i] for seed, pair in enumerate(pairs)} for i in (0, 1))
    interval = paired_difference(a, b)
    differences = [x - y for x, y in pairs]
    assert interval["mean"] == pytest.approx(np.mean(differences), abs=1e-12)
    if np.std(differences) > 1e-9:
        expected = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
        assert (interval["low"], interval["high"]) == pytest.approx((expected.low, expected.high), abs=1e-8)


def test_only_common_seeds_count():
    assert paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.5, 7: 0.0}) == {
        "mean": 0.5, "low": 0.5, "high": 0.5
    }  # fmt: skip
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0}) is None
    assert paired_difference({}, {}) is None


@given(st.integers(0, 2**20), st.integers(2, 4), st.integers(2, 6))
def test_mutual_information_is_that_of_the_slots(seed, domains, experts):
    generator = torch.Generator().manual_seed(seed)
    loads_DLE = torch.randint(0, 9, (domains, 2, experts), generator=generator)
    loads_DLE[0, :, 0] += 1
    expected = [
        mutual_info_score(None, None, contingency=loads_DLE[:, layer].numpy().astype(float))
        for layer in (0, 1)
    ]
    assert mutual_information(loads_DLE) == pytest.approx(float(np.mean(expected)), abs=1e-9)


def test_experts_of_one_domain_each_tell_all_of_it():
    loads_DLE = torch.zeros(3, 1, 6)
    for domain in range(3):
        loads_DLE[domain, 0, 2 * domain : 2 * domain + 2] = 5
    assert mutual_information(loads_DLE) == pytest.approx(math.log(3))
