"""``soft_topk``: its optimality conditions, its limits, its gradient, any scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from monge.ot import soft_topk


def by_root_finding(scores: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    s = scores.double() / temperature
    low, high = float(s.min()) - 40, float(s.max()) + 40
    tau = brentq(lambda tau: float(torch.sigmoid(s - tau).sum()) - k, low, high, xtol=1e-14, rtol=1e-15)
    return torch.sigmoid(s - tau)


@pytest.mark.parametrize(("E", "k"), [(2, 1), (8, 2), (64, 8), (64, 63), (5, 4)])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_agrees_with_a_root_finder(E, k, temperature):
    for _ in range(5):
        scores = torch.randn(E, dtype=torch.float64)
        expected = by_root_finding(scores, k, temperature)
        torch.testing.assert_close(
            soft_topk(scores, k, temperature=temperature), expected, rtol=1e-9, atol=1e-11
        )


@given(st.data())
def test_rows_sum_to_k_in_any_regime(data):
    E = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, E))
    entry = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, -1e30, 1e30, 1e-30]))
    scores = torch.tensor(data.draw(st.lists(entry, min_size=E, max_size=E)), dtype=torch.float64)
    temperature = 10.0 ** data.draw(st.integers(-12, 12))
    x = soft_topk(scores, k, temperature=temperature)
    assert x.min() >= 0
    assert x.max() <= 1
    assert abs(float(x.sum()) - k) < 1e-9
    assert (x.gather(0, scores.argsort()).diff() >= -1e-12).all()  # monotone in the scores


def test_it_maximises_score_plus_temperature_times_entropy():
    scores, temperature = torch.randn(6, dtype=torch.float64), 0.7

    def value(x):
        entropy = -(x * x.log() + (1 - x) * (1 - x).log()).sum()
        return (x * scores).sum() + temperature * entropy

    x = soft_topk(scores, 2, temperature=temperature)
    for _ in range(50):
        direction = torch.randn(6, dtype=torch.float64)
        direction -= direction.mean()  # keeps the sum
        assert value(x + 1e-3 * direction) < value(x)


def test_limits_of_the_temperature():
    scores = torch.randn(10, 8)
    hard = torch.zeros(10, 8).scatter(-1, scores.topk(3).indices, 1.0)
    torch.testing.assert_close(soft_topk(scores, 3, temperature=1e-6), hard)
    torch.testing.assert_close(soft_topk(scores, 3, temperature=1e9), torch.full((10, 8), 3 / 8))


def test_ties_share_equally():
    x = soft_topk(torch.tensor([1.0, 1.0, 1.0, -50.0]), 2, temperature=0.1)
    torch.testing.assert_close(x, torch.tensor([2 / 3, 2 / 3, 2 / 3, 0.0]))


def test_forbidden_columns_get_nothing():
    scores = torch.tensor(
        [[0.3, -torch.inf, 0.1, 0.2], [-torch.inf, 5.0, -torch.inf, -3.0]], requires_grad=True
    )
    x = soft_topk(scores, 2)
    assert x[0, 1] == 0
    torch.testing.assert_close(x.sum(-1), torch.tensor([2.0, 2.0]))
    assert x[1].tolist() == [0, 1, 0, 1]
    (x * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 1] == 0
    assert scores.grad[1].eq(0).all()


def test_k_equal_to_e_gives_ones_without_gradient():
    scores = torch.randn(3, 4, requires_grad=True)
    x = soft_topk(scores, 4)
    assert x.eq(1).all()
    x.sum().backward()
    assert scores.grad.eq(0).all()


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradcheck(k, temperature):
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, k, temperature=temperature), scores)


def test_the_gradient_is_finite_where_everything_is_saturated():
    scores = torch.tensor([[1e20, 3.0, -1e20, 0.0]], requires_grad=True)
    soft_topk(scores, 2, temperature=1e-8)[0, 1].backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_types(given, returned):
    scores = torch.randn(4, 6).to(given).requires_grad_()
    x = soft_topk(scores, 2)
    assert x.dtype == returned
    x.square().sum().backward()
    assert scores.grad.dtype == given


def test_shapes():
    assert soft_topk(torch.randn(7), 3).shape == (7,)
    assert soft_topk(torch.empty(0, 5), 2).shape == (0, 5)
    assert soft_topk(torch.randn(2, 3, 5), 2).sum(-1).sub(2).abs().max() < 1e-6


def test_compiles_without_graph_breaks():
    scores = torch.randn(16, 6, requires_grad=True)
    compiled = torch.compile(lambda s: soft_topk(s, 2, temperature=0.5), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(scores)[:, 0].sum(), scores)
    (expected,) = torch.autograd.grad(soft_topk(scores, 2, temperature=0.5)[:, 0].sum(), scores)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must be an integer in 1\.\.E = 4, got 0"),
        ({"k": 5}, r"k must be an integer in 1\.\.E = 4, got 5"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        (
            {"scores": torch.ones(2, 4, dtype=torch.int32)},
            "scores must be a floating-point tensor .* torch.int32",
        ),
        ({"scores": torch.tensor(1.0)}, "scores must be a floating-point tensor"),
        (
            {"scores": torch.tensor([[0.0, torch.nan, 0, 0]])},
            r"1 of 4 are NaN or \+inf, the first at \(0, 1\)",
        ),
        ({"scores": torch.tensor([[0.0, torch.inf, 0, 0]])}, r"NaN or \+inf"),
        (
            {"scores": torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])},
            "at least k = 2 finite scores",
        ),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"scores": torch.randn(2, 4), "k": 2, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        soft_topk(arguments.pop("scores"), arguments.pop("k"), **arguments)


def test_wrong_kind_of_object():
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        soft_topk([1.0, 2.0], 1)
