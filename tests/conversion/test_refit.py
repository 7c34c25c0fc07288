"""Ridge regression of the output projection and of the router, against lstsq and against arithmetic."""

from __future__ import annotations

import pytest
import torch

from monge.conversion.refit import PANEL, SKETCH, refit_down, ridge, token_weights, weighted_gram
from monge.conversion.router_fit import RidgeRouter, expert_energy, unit_logits
from monge.conversion.types import SHARED, FFNWeights, LayerSample


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_ridge_is_the_solution_of_the_stacked_least_squares_problem():
    h, t = draw(50, 7, dtype=torch.float64), draw(50, 3, seed=1, dtype=torch.float64)
    penalty = draw(7, seed=2, dtype=torch.float64).abs()
    stacked = torch.cat([h, penalty.sqrt().diag()])
    wanted = torch.linalg.lstsq(stacked, torch.cat([t, torch.zeros(7, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(ridge(h.T @ h, h.T @ t, penalty), wanted)


def test_ridge_of_a_zero_matrix_is_zero_and_of_nan_is_refused():
    assert (ridge(torch.zeros(4, 4), torch.zeros(4, 2), torch.zeros(4)) == 0).all()
    with pytest.raises(ValueError, match="ridge regression of 4 features"):
        ridge(torch.full((4, 4), float("nan")), torch.zeros(4, 2), torch.ones(4))


def test_the_refit_is_drawn_towards_the_old_projection():
    """The stationary point of the penalised loss, by autograd."""
    h, t, old = draw(60, 5), draw(60, 3, seed=1), draw(3, 5, seed=2)
    weight = draw(60, seed=3).abs()
    held_out = torch.zeros(60, dtype=torch.bool)
    held_out[:1] = True
    t[0] = 0
    h[0] = 0  # a held-out token that says nothing: the projection has zero error either way
    refit = refit_down(h, t + 5 * h @ draw(5, 3, seed=4), weight, held_out, old, lambdas=(0.5,))
    assert refit.down_HF is old  # nothing gained on what is held out, so nothing is changed
    held_out[:8] = True
    target = t + 5 * h @ draw(5, 3, seed=4)
    refit = refit_down(h, target, weight, held_out, old, lambdas=(0.5,))
    new = refit.down_HF.double().clone().requires_grad_()
    energy = (weight[:, None] * h.square()).sum(0).double()
    penalty = 0.5 * (energy * energy.mean()).sqrt()
    loss = (weight.double() * (target.double() - h.double() @ new.T).square().sum(1)).sum()
    loss = loss + (penalty * (new - old.double()).square().sum(0)).sum()
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.abs().max() < 1e-3 * energy.max()


def test_weighted_gram_sums_over_the_kept_tokens_in_pieces():
    h, t, w = draw(5000, 6), draw(5000, 2, seed=1), draw(5000, seed=2).abs()
    keep = torch.arange(5000) % 3 != 0
    gram, cross = weighted_gram(h, t, w, keep)
    kept, weights = h[keep].double(), w[keep].double()
    torch.testing.assert_close(gram, kept.T @ (weights[:, None] * kept), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cross, kept.T @ (weights[:, None] * t[keep].double()), rtol=1e-5, atol=1e-4)


def test_a_gram_matrix_of_several_panels_is_whole_and_symmetric():
    F = PANEL + 70
    h, t, w = draw(100, F), draw(100, 2, seed=1), draw(100, seed=2).abs()
    gram, _ = weighted_gram(h, t, w, torch.ones(100, dtype=torch.bool))
    torch.testing.assert_close(gram, h.double().T @ (w[:, None] * h).double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(gram, gram.T)


def test_lambda_is_that_of_all_outputs_though_chosen_on_a_sketch_of_them():
    """Outputs beyond the sketch's width, with the truth scaled so that each lambda wins once."""
    lambdas, found = (0.01, 0.1, 1.0, 10.0), set()
    for noise in (0.3, 3.0, 8.0, 30.0):
        h, held_out = draw(400, 40, seed=7), torch.arange(400) % 8 == 7
        old = draw(4 * SKETCH, 40, seed=8)
        target = h @ (old + 0.5 * draw(*old.shape, seed=9)).T + noise * draw(400, len(old), seed=10)
        alone = {
            lam: refit_down(h, target, torch.ones(400), held_out, old, lambdas=(lam,)).error
            for lam in lambdas
        }
        refit = refit_down(h, target, torch.ones(400), held_out, old, lambdas=lambdas)
        assert refit.lam == min(alone, key=alone.get)
        assert refit.error == alone[refit.lam]
        found.add(refit.lam)
    assert len(found) >= 3


def test_a_linear_truth_is_recovered():
    h = draw(400, 10)
    truth = draw(3, 10, seed=1)
    held_out = torch.arange(400) % 8 == 7
    refit = refit_down(h, h @ truth.T, torch.ones(400), held_out, torch.zeros(3, 10), lambdas=(1e-7,))
    torch.testing.assert_close(refit.down_HF, truth, rtol=1e-4, atol=1e-4)
    assert refit.error < 1e-6
    assert refit.error_before == pytest.approx(1.0)


def test_errors_are_those_of_the_held_out_tokens():
    h, t, w, down = draw(64, 5), draw(64, 2, seed=1), draw(64, seed=2).abs(), draw(2, 5, seed=3)
    held_out = torch.arange(64) >= 48
    refit = refit_down(h, t, w, held_out, down, lambdas=())
    error = (w * (t - h @ down.T).square().sum(1))[held_out].sum() / (w * t.square().sum(1))[held_out].sum()
    assert refit.error_before == pytest.approx(float(error), rel=1e-4)
    assert refit.lam == float("inf")
    assert refit.down_HF is down


def test_a_projection_that_no_lambda_beats_stays():
    h, truth = draw(64, 20), draw(2, 20, seed=1)
    held_out = torch.arange(64) >= 8  # eight noisy tokens to learn from
    target = h @ truth.T
    target[:8] += 30 * draw(8, 2, seed=2)
    refit = refit_down(h, target, torch.ones(64), held_out, truth)
    assert refit.down_HF is truth


def test_token_weights_are_bounded_where_the_output_is_huge_or_nothing():
    y, target = draw(101, 4), draw(101, 4, seed=1)
    y[0], target[1], y[2], target[2] = 1e4, 1e4, 0.0, 0.0
    weights = token_weights(y, target)
    assert weights.mean() == pytest.approx(1)
    assert weights.argmax() == 2
    assert weights[2] / weights.median() < 10
    assert weights[:2].max() < 1e-6
    assert torch.isfinite(token_weights(torch.zeros(3, 2), torch.zeros(3, 2))).all()


def sample_of(T=300, H=12, F=16):
    weights = FFNWeights("gelu", draw(F, H, seed=3), draw(H, F, seed=4))
    x = draw(T, H, seed=5)
    return LayerSample(0, weights, x, weights.hidden(x), draw(T, seed=6).abs())


def test_expert_energy_is_the_sum_over_its_neurons():
    sample = sample_of()
    labels = torch.tensor([SHARED, 0, 1, 2] * 4)
    energy = expert_energy(sample, labels, 3)
    wd2 = sample.weights.down_HF.square().sum(0)
    for e in range(3):
        mine = labels == e
        wanted = sample.weight_T * (sample.hidden_TF[:, mine].square() * wd2[mine]).sum(1)
        torch.testing.assert_close(energy[:, e], wanted)


def test_the_ridge_router_ranks_experts_that_are_linear_in_the_input():
    x = draw(2000, 12)
    truth = draw(5, 12, seed=1)
    router = RidgeRouter(x).fit(x @ truth.T)
    logits = x @ router.T
    assert logits.std() == pytest.approx(1, rel=1e-4)
    agreement = ((x @ truth.T).topk(2).indices.sort().values == logits.topk(2).indices.sort().values).all(1)
    assert agreement.double().mean() > 0.95


def test_a_router_without_signal_stays_finite():
    assert (unit_logits(torch.zeros(3, 4), draw(10, 4)) == 0).all()
