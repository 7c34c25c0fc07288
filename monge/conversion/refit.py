"""Refit of the output projection: the linear map that best makes up for the neurons a token does without.

Shapes: T tokens, F neurons, H model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAMBDAS = (0.03, 0.1, 0.3, 1.0)
"""Ridge parameters tried, in units of the geometric mean of a neuron's energy and the mean energy."""
SMALLEST = 1e-30  # penalty of a feature that is always zero
CHUNK = 2048  # tokens per Gram update: float32 products, summed in float64
PANEL = 384  # rows of a Gram matrix at once; what lies below the diagonal is not computed but mirrored
SKETCH = 64
"""Random combinations of the H outputs on which lambda is chosen. Every output is a regression of its own on
one and the same Gram matrix, so the mean over a few combinations ranks the lambdas as all outputs would."""


class Refit(NamedTuple):
    """Attributes:
    down_HF: the new projection.
    lam: the ridge parameter chosen; infinite where no refit was better.
    error: weighted relative error on the held-out tokens, sum w |t - y|^2 / sum w |t|^2.
    error_before: the same with the projection as it was.
    """

    down_HF: Tensor
    lam: float
    error: float
    error_before: float


def token_weights(y_TH: Tensor, target_TH: Tensor) -> Tensor:
    """(T,) ``1 / (max(|y|^2, |t|^2) + median |y|^2)``, scaled to mean 1.

    A relative error, bounded where the output is small and where it is huge: a few tokens with massive
    activations would else decide the fit of the middle layers.
    """
    y_T, target_T = (torch.linalg.vector_norm(x_TH, dim=1).square() for x_TH in (y_TH, target_TH))
    weight_T = 1 / (torch.maximum(y_T, target_T) + y_T.median()).clamp_min(torch.finfo(y_T.dtype).tiny)
    return weight_T / weight_T.mean()


def ridge(gram_FF: Tensor, cross_FH: Tensor, penalty_F: Tensor) -> Tensor:
    """(F, H) float64: ``argmin_W |w^(1/2) (t - h W)|^2 + sum_f p_f |W_f|^2 = (S + diag p)^-1 C``.

    Args:
        gram_FF: S = sum w h h^T.
        cross_FH: C = sum w h t^T.
        penalty_F: p, not negative.

    Raises:
        ValueError: the system is singular to working precision.
    """
    system_FF = gram_FF.double().clone()
    system_FF.diagonal().add_(penalty_F.clamp_min(SMALLEST))
    lower_FF, info = torch.linalg.cholesky_ex(system_FF)
    if int(info):
        raise ValueError(
            f"ridge regression of {gram_FF.shape[0]} features fails: the Gram matrix is not positive "
            "definite; activations may be NaN or infinite"
        )
    return torch.cholesky_solve(cross_FH.double(), lower_FF)


def weighted_gram(
    hidden_TF: Tensor, target_TH: Tensor, weight_T: Tensor, keep_T: Tensor
) -> tuple[Tensor, Tensor]:
    """``(sum w h h^T (F, F), sum w h t^T (F, H))`` over the kept tokens, summed in float64."""
    F, H = hidden_TF.shape[1], target_TH.shape[1]
    gram_FF = hidden_TF.new_zeros((F, F), dtype=torch.float64)
    cross_FH = hidden_TF.new_zeros((F, H), dtype=torch.float64)
    for start in range(0, len(weight_T), CHUNK):
        part = slice(start, start + CHUNK)
        keep_t = keep_T[part]
        hidden_tF = hidden_TF[part][keep_t]
        weighted_Ft = (hidden_tF * weight_T[part][keep_t, None]).t()
        for row in range(0, F, PANEL):
            gram_FF[row : row + PANEL, row:] += weighted_Ft[row : row + PANEL] @ hidden_tF[:, row:]
        cross_FH += weighted_Ft @ target_TH[part][keep_t]
    upper_FF = gram_FF.triu()
    return upper_FF + upper_FF.triu(1).t(), cross_FH


def refit_down(
    hidden_TF: Tensor,
    target_TH: Tensor,
    weight_T: Tensor,
    held_out_T: Tensor,
    down_HF: Tensor,
    *,
    lambdas: tuple[float, ...] = LAMBDAS,
) -> Refit:
    """Ridge regression of the targets on the gated activations, drawn towards the projection as it was.

    ``W = argmin sum_t w_t |t_t - W h_t|^2 + lambda sum_f p_f |W_f - Wd_f|^2``, the penalty p_f being the
    geometric mean of S_ff and the mean of the diagonal, with S the Gram matrix: between a penalty equal for
    all neurons, which holds back the rare ones too much, and one in proportion to their energy. Fitted
    without the held-out tokens for every lambda, on a sketch of the outputs; with the best one on all. Where
    that does not beat the old projection on the held-out tokens, the old one stays.

    Drawn towards zero instead, the error of layers of SmolLM2 is 3 to 10 % larger.

    Args:
        hidden_TF: gated activations.
        target_TH: what the layer should add to the residual stream (output bias taken off).
        weight_T: weights of the tokens.
        held_out_T: bool, the tokens that choose lambda.
        down_HF: Wd, the projection as it is.
    """
    old_FH = down_HF.double().t()
    squared_T = weight_T.double() * torch.linalg.vector_norm(target_TH, dim=1).double().square()
    total = max(float(squared_T[held_out_T].sum()), 1e-300)
    fit, check = (
        _Moments.around(old_FH, *weighted_gram(hidden_TF, target_TH, weight_T, keep_T), squared_T[keep_T])
        for keep_T in (~held_out_T, held_out_T)
    )
    before = check.squared / total
    if lambdas:
        lam = _best_lambda(fit, check, lambdas)
        error = check.error(fit.solve(lam)) / total
        if error < before:  # which NaN is not
            whole_FH = old_FH + (fit + check).solve(lam)
            return Refit(whole_FH.t().to(down_HF.dtype).contiguous(), lam, error, before)
    return Refit(down_HF, float("inf"), before, before)


def _best_lambda(fit: _Moments, check: _Moments, lambdas: tuple[float, ...]) -> float:
    """The one whose solution from ``fit`` leaves the least of ``check``."""
    width = fit.cross_FH.shape[1]
    if width > SKETCH:
        mix_HS = torch.randn((width, SKETCH), generator=torch.Generator().manual_seed(width))
        mix_HS = mix_HS.to(fit.cross_FH)
        fit, check = (moments._replace(cross_FH=moments.cross_FH @ mix_HS) for moments in (fit, check))
    return min(lambdas, key=lambda lam: check.error(fit.solve(lam)))


class _Moments(NamedTuple):
    """What least squares needs of the tokens, float64, r = t - Wd h being what the old projection leaves.

    S = sum w h h^T (F, F), D = sum w h r^T (F, H) and sum w |r|^2.
    """

    gram_FF: Tensor
    cross_FH: Tensor
    squared: float

    @classmethod
    def around(cls, old_FH: Tensor, gram_FF: Tensor, cross_FH: Tensor, squared_t: Tensor) -> _Moments:
        """From S, ``sum w h t^T`` and the ``w |t|^2`` of the tokens."""
        left_FH = cross_FH - gram_FF @ old_FH
        squared = float(squared_t.sum() - (old_FH * (cross_FH + left_FH)).sum())
        return cls(gram_FF, left_FH, squared)

    def __add__(self, other: _Moments) -> _Moments:  # type: ignore[override]
        return _Moments(
            self.gram_FF + other.gram_FF, self.cross_FH + other.cross_FH, self.squared + other.squared
        )

    def solve(self, lam: float) -> Tensor:
        """(F, H) what one lambda adds to the projection."""
        energy_F = self.gram_FF.diagonal()
        penalty_F = lam * (energy_F * energy_F.mean()).sqrt()
        return ridge(self.gram_FF, self.cross_FH, penalty_F)

    def error(self, added_FH: Tensor) -> float:
        """``sum w |r - A h|^2``."""
        explained_FH = 2 * self.cross_FH - self.gram_FF @ added_FH
        return self.squared - float((added_FH * explained_FH).sum())
