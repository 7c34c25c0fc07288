"""Price steps against their definitions written out in loops, and what they are for: balance."""

from __future__ import annotations

import pytest
import torch

from monge.ot import assign, margin_prices, quantile_prices, sign_prices


def skewed(T: int, E: int, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, T, E) + 2 * torch.randn(*batch, 1, E)


def loads(scores: torch.Tensor, prices: torch.Tensor, k: int) -> torch.Tensor:
    return (scores - prices).topk(k).indices.flatten().bincount(minlength=scores.shape[-1])


def quantile_by_hand(scores: torch.Tensor, b: torch.Tensor, k: int, n: int) -> torch.Tensor:
    a = (scores - b).sort(-1, descending=True).values[:, k]
    return torch.stack([(scores[:, e] - a).sort(descending=True).values[n] for e in range(scores.shape[1])])


def margin_by_hand(scores: torch.Tensor, b: torch.Tensor, k: int, n: int) -> torch.Tensor:
    adjusted = scores - b
    steps = []
    for e in range(scores.shape[1]):
        margins = []
        for row in adjusted:
            others = torch.cat((row[:e], row[e + 1 :])).sort(descending=True).values
            # What e must beat to be among the k largest; a forbidden pair never is.
            margins.append(row[e] - others[k - 1] if row[e] > -torch.inf else row[e])
        ordered = torch.stack(margins).sort(descending=True).values
        steps.append(0.5 * (ordered[n - 1] + ordered[n]))
    return torch.stack(steps)


@pytest.mark.parametrize(("T", "E", "k"), [(24, 4, 1), (24, 6, 2), (25, 7, 3), (10, 5, 4)])
def test_a_quantile_step_is_its_definition(T, E, k):
    scores, b = skewed(T, E), torch.randn(E)
    expected = quantile_by_hand(scores, b, k, T * k // E)
    torch.testing.assert_close(quantile_prices(scores, k, prices=b), expected)
    clipped = quantile_prices(scores, k, prices=b, capacity=T - 1)
    torch.testing.assert_close(clipped, quantile_by_hand(scores, b, k, T - 1).clamp(min=0))


@pytest.mark.parametrize(("T", "E", "k"), [(24, 4, 1), (24, 6, 2), (25, 7, 3), (10, 5, 4)])
def test_a_margin_step_is_its_definition(T, E, k):
    scores, b = skewed(T, E), torch.randn(E)
    moved = b + 0.9 * margin_by_hand(scores, b, k, T * k // E)
    torch.testing.assert_close(margin_prices(scores, k, prices=b), moved - moved.mean() + b.mean())
    capacity = T - 1
    moved = b + 0.9 * margin_by_hand(scores, b, k, capacity)
    expected = (moved - moved.min().clamp(min=0)).clamp(min=0)
    torch.testing.assert_close(margin_prices(scores, k, prices=b, capacity=capacity), expected)


def test_a_margin_step_with_ties_and_forbidden_pairs_is_its_definition():
    scores = torch.randint(0, 3, (40, 5)).float()
    torch.testing.assert_close(
        margin_prices(scores, 2), 0.9 * centred(margin_by_hand(scores, torch.zeros(5), 2, 16))
    )
    scores[::4, 1:] = -torch.inf  # fewer than k finite scores: a forbidden pair must not count as chosen
    expected = 0.9 * centred(margin_by_hand(scores, torch.zeros(5), 2, 16))
    torch.testing.assert_close(margin_prices(scores, 2), expected)


def centred(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean()


def test_a_margin_step_of_one_column_balances_it():
    scores = torch.randn(60, 5)
    scores[:, 3] += 2.0
    full = margin_prices(scores, 2, damping=1.0, capacity=25)
    alone = torch.zeros(5)
    alone[3] = full[3]
    assert loads(scores, alone, 2)[3] == 25


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
@pytest.mark.parametrize(("T", "E", "k"), [(1024, 16, 2), (4096, 32, 4)])
def test_steps_balance_skewed_scores(step, T, E, k):
    scores = skewed(T, E)
    mean = T * k / E
    before = loads(scores, torch.zeros(E), k).max() / mean - 1
    after = loads(scores, step(scores, k, steps=10), k).max() / mean - 1
    assert before > 1.0
    assert after < (0.02 if step is margin_prices else 0.2)


def test_the_margin_step_beats_the_quantile_step():
    wins = 0
    for _ in range(10):
        scores = skewed(1024, 32)
        margin, quantile = margin_prices(scores, 4, steps=6), quantile_prices(scores, 4, steps=6)
        wins += (loads(scores, margin, 4) - 128).abs().sum() < (loads(scores, quantile, 4) - 128).abs().sum()
    assert wins >= 9


def test_margin_steps_approach_the_optimal_dual():
    scores = skewed(512, 8)
    answer = assign(scores, 2)
    b = margin_prices(scores, 2, steps=30).double()
    dual = (scores - b).topk(2).values.sum() + 128 * b.sum()
    assert dual >= answer.objective - 1e-6
    assert dual <= answer.objective * (1 + 1e-5)


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
def test_a_constant_shift_of_prices_is_kept(step):
    scores, b = skewed(64, 4), torch.randn(4)
    torch.testing.assert_close(step(scores, 1, prices=b + 3.0), step(scores, 1, prices=b) + 3.0)


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
@pytest.mark.parametrize("capacity", [None, 9])
def test_masked_rows_do_not_exist(step, capacity):
    scores, mask = skewed(50, 6, 3), torch.rand(3, 50) < 0.6
    expected = torch.stack([step(s[m], 2, capacity=capacity, steps=3) for s, m in zip(scores, mask)])
    scores[~mask] = torch.nan
    torch.testing.assert_close(step(scores, 2, capacity=capacity, steps=3, mask=mask), expected)


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
def test_degenerate_shapes(step):
    b = torch.tensor([1.0, -2.0, 0.5])
    assert torch.equal(step(torch.randn(8, 3), 3, prices=b), b)  # k = E: nothing to choose
    assert torch.equal(step(torch.empty(0, 3), 2, prices=b), b)
    assert torch.equal(step(torch.randn(8, 3), 1, capacity=8, prices=b), torch.zeros(3))
    assert step(torch.randn(1, 3), 2, prices=b).isfinite().all()
    few = torch.arange(8) < 2
    assert torch.equal(step(torch.randn(8, 3), 1, capacity=5, mask=few, prices=b), torch.zeros(3))
    masked = step(torch.randn(8, 3), 1, mask=torch.zeros(8, dtype=torch.bool), prices=b)
    torch.testing.assert_close(masked, b)


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
def test_forbidden_pairs_and_ties_stay_finite(step):
    scores = torch.zeros(32, 4)
    scores[:, 1] = -torch.inf
    scores[::2, 2] = -torch.inf
    assert step(scores, 2, steps=4).isfinite().all()
    assert step(scores, 3, steps=4).isfinite().all()  # half of the rows have fewer than k finite scores


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
def test_types_gradients_and_compile(step):
    scores = skewed(64, 4).requires_grad_()
    prices = step(scores, 1)
    assert not prices.requires_grad
    assert prices.dtype == torch.float32
    assert step(scores.double(), 1).dtype == torch.float64
    assert step(scores.bfloat16(), 1).dtype == torch.float32
    mask = torch.rand(64) < 0.5
    compiled = torch.compile(lambda s, m: step(s, 1, mask=m, steps=2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, mask), step(scores, 1, mask=mask, steps=2))


def test_the_sign_step_lowers_the_violation():
    scores, b = skewed(512, 8), torch.zeros(8)
    start = loads(scores, b, 2)
    for _ in range(400):
        b = sign_prices(b, loads(scores, b, 2), rate=0.02)
    assert (loads(scores, b, 2).max() - 128) < 0.1 * (start.max() - 128)
    assert torch.equal(
        sign_prices(torch.zeros(2, 3), torch.tensor([[1, 1, 1], [0, 0, 3]]), 1.0)[0], torch.zeros(3)
    )


@pytest.mark.parametrize("step", [margin_prices, quantile_prices])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must lie in 1\.\.E = 3, got 0"),
        ({"k": 4}, r"k must lie in 1\.\.E = 3, got 4"),
        ({"prices": torch.zeros(4)}, r"prices must be .* got \(4,\)"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, r"mask must be bool \(8,\), got torch.bool \(7,\)"),
        ({"scores_TE": torch.zeros(8, 3, dtype=torch.int64)}, "scores must be a floating-point tensor"),
        ({"scores_TE": torch.zeros(8)}, r"scores must be .* \(8,\)"),
        ({"capacity": -1}, "capacity must be None or a non-negative integer, got -1"),
    ],
)
def test_bad_arguments(step, change, message):
    with pytest.raises(ValueError, match=message):
        step(**({"scores_TE": torch.randn(8, 3), "k": 1} | change))


def test_sign_prices_wants_matching_shapes():
    with pytest.raises(ValueError, match=r"prices \(3,\) and loads \(4,\) must have one shape"):
        sign_prices(torch.zeros(3), torch.zeros(4))
