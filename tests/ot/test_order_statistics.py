"""The n-th largest by counting against sorting, on one process; test_assign_group.py has it over ranks.

Shapes: T rows, E columns.
"""

from __future__ import annotations

import copy
import pickle

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from monge.ot.distributed import LOCAL, RowGroup, nth_largest
from monge.ot.targets import Target

FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, float("inf"), -float("inf")]


@settings(max_examples=60)
@given(
    values=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from(FLOATS)
    ),
    n=st.integers(0, 10),
    double=st.booleans(),
)
def test_equals_sorting(values, n, double):
    values_TE = torch.from_numpy(values).to(torch.float64 if double else torch.float32)
    T, E = values_TE.shape
    found_E = nth_largest(values_TE, torch.tensor([n]), LOCAL)
    expected_E = values_TE.sort(dim=0, descending=True).values[n] if n < T else torch.full((E,), -torch.inf)
    assert found_E.tolist() == expected_E.tolist()
    assert found_E.dtype == values_TE.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 7, 39])
def test_the_middle_is_that_of_the_local_target(n, dtype):
    values_BTE = torch.randn(2, 40, 5, dtype=dtype)
    values_BTE[0, :12] = values_BTE[0, 12:13]  # ties
    values_BTE[1, 3:30, 0] = -torch.inf
    values_BTE[1, 0, 1] = torch.inf
    for midway in (False, True):
        expected_BE = Target(n, False).threshold(values_BTE, midway=midway)
        found_BE = nth_largest(values_BTE, torch.tensor([n]), LOCAL, midway=midway)
        assert torch.equal(found_BE, expected_BE)


def test_no_rows():
    assert nth_largest(torch.zeros(0, 3), torch.tensor([0]), LOCAL).tolist() == [-torch.inf] * 3


def test_a_group_of_one_process_exchanges_nothing():
    values = torch.arange(3.0)
    assert LOCAL.is_local
    assert (LOCAL.size, LOCAL.rank) == (1, 0)
    assert LOCAL.sum(values) is LOCAL.max(values) is values
    assert torch.equal(LOCAL.gather(values), values[None])


def test_a_copy_shares_its_group_and_a_pickle_leaves_it():
    handle = object()
    rows = RowGroup(handle)  # type: ignore[arg-type]
    assert copy.deepcopy(rows).group is handle
    assert pickle.loads(pickle.dumps(rows)).is_local
