"""Newton's method on the column potentials, for small epsilon where plain iterations crawl.

With the rows scaled to their mass, the dual is a concave function of the E column potentials alone (the
semi-dual): gradient ``b - c(log_v)``, c being the column sums of the plan P, and Hessian ``-(diag(c) - P^T
diag(r)^-1 P)``. Three measures make it safe from a cold start:

- epsilon is annealed from a level where the plan is smooth, by a quarter a level, potentials carried over;
- a step is clipped to a radius in the largest component, since the quadratic model holds over a few units of
  log only; the radius grows while the slope along a clipped step stays more than half, and shrinks on
  rejection;
- a step is accepted when the dual still rises at its end (by concavity it rose all the way) or when the
  total column error fell.

Shapes: B problems, E columns.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from monge.ot.entropic.iteration import Potentials, Stopping
from monge.ot.entropic.laplacian import solve_laplacian

_SMOOTH_SPREAD = 8.0  # spread / epsilon of the first level
_ANNEAL = 4.0
_LEVEL_DONE = 0.03  # share of the mass in the wrong column at which a level hands over to the next
_RADIUS = 3.0
_PATIENCE = 30  # sweeps at the last level without a smaller error after which there is none to be had


class SecondOrderForm(Protocol):
    """Scores that can be asked for the first two derivatives of the semi-dual."""

    def moments(self, log_v_BE: Tensor, epsilon_B: Tensor) -> tuple[Tensor, Tensor]:
        """Column sums (B, E) of the plan P and ``P^T diag(r)^-1 P`` (B, E, E), each at its own epsilon."""
        ...


def newton(
    form: SecondOrderForm,
    log_mass_BE: Tensor,
    top_BE: Tensor,
    col_mass_BE: Tensor,
    stopping: Stopping,
    *,
    epsilon: float,
    spread: float,
) -> Potentials:
    """Column potentials at ``epsilon`` by annealed Newton steps.

    Args:
        form: the scores.
        log_mass_BE: logarithms of the column masses, up to a constant.
        top_BE: the largest score of each column.
        col_mass_BE: what the column sums shall be.
        stopping: the tolerance and the cap, in evaluations of the moments.
        epsilon: the regularisation asked for.
        spread: the largest difference of two scores in a row after ``top_BE`` is taken off; sets the number
            of levels.
    """
    levels = max(0, math.ceil(math.log(max(spread / (epsilon * _SMOOTH_SPREAD), 1.0), _ANNEAL)))
    total_B = col_mass_BE.sum(-1)
    level_B = torch.full_like(total_B, levels)
    radius_B = torch.full_like(total_B, _RADIUS)
    sweeps_B = torch.zeros_like(total_B, dtype=torch.int64)
    done_B = torch.zeros_like(total_B, dtype=torch.bool)
    least_B, since_B = torch.full_like(total_B, torch.inf), torch.zeros_like(sweeps_B)
    fresh_B = torch.ones_like(done_B)  # just arrived at a level: whatever is there is the point to start from

    log_v_BE = trial_BE = log_mass_BE - top_BE / (epsilon * _ANNEAL**levels)
    step_BE = residual_BE = torch.zeros_like(log_v_BE)
    clipped_B = torch.zeros_like(done_B)
    matrices: tuple[Tensor, Tensor] | None = None
    spent = 0
    while True:
        spent += 1
        sums_BE, gram_BEE = form.moments(trial_BE, epsilon * _ANNEAL**level_B)
        trial_residual_BE = col_mass_BE - sums_BE
        slope_B = (residual_BE * step_BE).sum(-1)
        trial_slope_B = (trial_residual_BE * step_BE).sum(-1)
        fell_B = trial_residual_BE.abs().sum(-1) < residual_BE.abs().sum(-1)
        accepted_B = fresh_B | (trial_slope_B >= 0) | fell_B
        radius_B = torch.where(clipped_B & (trial_slope_B >= 0.5 * slope_B), 2 * radius_B, radius_B)
        radius_B = torch.where(accepted_B, radius_B, torch.minimum(radius_B, step_BE.abs().amax(-1)) / 4)
        log_v_BE = torch.where(accepted_B.unsqueeze(-1), trial_BE, log_v_BE)
        residual_BE = torch.where(accepted_B.unsqueeze(-1), trial_residual_BE, residual_BE)
        if matrices is not None:
            sums_BE = torch.where(accepted_B.unsqueeze(-1), sums_BE, matrices[0])
            gram_BEE = torch.where(accepted_B[:, None, None], gram_BEE, matrices[1])
        matrices = sums_BE, gram_BEE

        errors_B = stopping.errors(residual_BE)
        sweeps_B = sweeps_B + ~done_B
        better_B = (level_B > 0) | (errors_B < 0.9 * least_B)
        least_B = torch.where(level_B > 0, torch.inf, torch.where(better_B, errors_B, least_B))
        since_B = torch.where(better_B, 0, since_B + 1)
        done_B = (level_B == 0) & ((errors_B <= stopping.tol) | (since_B >= _PATIENCE))
        if spent == stopping.max_iters:
            break
        if spent % stopping.check_every == 0:
            stopping.worst(errors_B)
            if bool(done_B.all()):
                break

        fresh_B = (level_B > 0) & (residual_BE.abs().sum(-1) <= _LEVEL_DONE * total_B)
        level_B = level_B - fresh_B.to(level_B.dtype)
        radius_B = torch.where(fresh_B, _RADIUS, radius_B)
        step_BE = solve_laplacian(gram_BEE, sums_BE, residual_BE, weight_BE=sums_BE + col_mass_BE)
        length_B = step_BE.abs().amax(-1)
        clipped_B = (length_B > radius_B) & ~fresh_B
        step_BE = step_BE * torch.where(clipped_B, radius_B / length_B, 1.0).unsqueeze(-1)
        step_BE = torch.where((fresh_B | done_B).unsqueeze(-1), 0.0, step_BE)
        log_v_BE = torch.where(fresh_B.unsqueeze(-1), _ANNEAL * log_v_BE, log_v_BE)
        trial_BE = log_v_BE + step_BE
    # A problem caught above the last level has the potentials of a larger epsilon.
    log_v_BE = log_v_BE * (_ANNEAL**level_B).unsqueeze(-1)
    errors_B = torch.where(level_B == 0, errors_B, torch.inf)
    return Potentials(log_v_BE, sweeps_B, errors_B, spent)
