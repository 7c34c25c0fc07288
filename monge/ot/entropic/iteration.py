"""The fixed-point iteration of Sinkhorn on the column potentials, whatever form its sweeps take.

One iteration is a sweep (scale the rows to their mass, sum the columns) and the column scaling
``log_v += log(column mass / column sums)``. Only E numbers go from one iteration to the next. It ends right
after a row scaling, so that the row sums are exact and the error sits in the columns.

Shapes: B problems, E columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RATE_SPAN = 4  # sweeps over which the rate of convergence is measured


def largest(values: Tensor) -> float:
    """The largest value as a number, 0 where there are none; waits for the device."""
    return float(values.max()) if values.numel() else 0.0


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a solve is done, and when it gives up.

    Attributes:
        tol: the largest column error that counts as converged.
        max_iters: the most sweeps.
        unit_B: the mass in which errors are measured.
        check_every: sweeps between two looks at the errors by the host.
    """

    tol: float
    max_iters: int
    unit_B: Tensor
    check_every: int = 1

    def errors(self, residual_BE: Tensor) -> Tensor:
        """(B,): the largest column error of each problem."""
        return residual_BE.detach().abs().amax(-1) / self.unit_B

    def worst(self, errors_B: Tensor) -> float:
        """The largest error as a number, which waits for the device; raises where it is NaN."""
        worst = largest(errors_B)
        if math.isnan(worst):
            raise ValueError(
                "scores or masses hold NaN or infinite values: find where they come from upstream"
            )
        return worst


@dataclass(frozen=True, slots=True)
class Potentials:
    """Where an iteration stands: potentials (B, E), sweeps (B,) int64, column errors (B,), sweeps spent."""

    log_v_BE: Tensor
    sweeps_B: Tensor
    errors_B: Tensor
    spent: int


def hopeless(error: float, before: float, span: int, step: int, tol: float, max_iters: int) -> bool:
    """Whether an error that falls on as it did over the last ``span`` sweeps will miss ``tol`` at the cap."""
    if step < 8 or tol == 0.0:
        return False
    rate = math.log(error / before) / span
    return rate >= 0.0 or math.log(tol / error) / rate > max_iters - step


def iterate(
    sweep: Callable[[Tensor], Tensor],
    log_v_BE: Tensor,
    col_mass_BE: Tensor,
    stopping: Stopping,
    *,
    give_up_until: int = 0,
) -> Potentials:
    """Iterate until every problem is within the tolerance or the sweeps are used up.

    Args:
        sweep: from column potentials (B, E) to the column sums (B, E) of the row-scaled plan.
        log_v_BE: where to start.
        col_mass_BE: what the column sums shall be.
        stopping: the tolerance and the cap.
        give_up_until: up to this many sweeps, stop early when the rate of convergence says that the cap will
            come first.
    """
    # A column without mass sums to 0 and is held at the smallest number, so that its update is exactly 0.
    tiny = torch.finfo(col_mass_BE.dtype).tiny
    log_mass_BE = torch.where(col_mass_BE > 0, col_mass_BE, tiny).log()
    sweeps_B = torch.zeros(log_v_BE.shape[0], dtype=torch.int64, device=log_v_BE.device)
    done_B = torch.zeros_like(sweeps_B, dtype=torch.bool)
    span = max(RATE_SPAN, stopping.check_every)
    seen: dict[int, float] = {}
    step = 0
    while True:
        step += 1
        sums_BE = sweep(log_v_BE)
        errors_B = stopping.errors(sums_BE - col_mass_BE)
        sweeps_B = sweeps_B + ~done_B
        done_B = errors_B <= stopping.tol
        if step == stopping.max_iters:
            break
        if step % stopping.check_every == 0:
            error = seen[step] = stopping.worst(errors_B)
            before = seen.get(step - span, 0.0)
            if error <= stopping.tol or (
                step <= give_up_until
                and before > 0
                and hopeless(error, before, span, step, stopping.tol, stopping.max_iters)
            ):
                break
        # A problem that is done keeps its potentials while others in the batch go on.
        update_BE = log_mass_BE - sums_BE.clamp_min(tiny).log()
        log_v_BE = log_v_BE + torch.where(done_B.unsqueeze(-1), 0.0, update_BE)
    return Potentials(log_v_BE, sweeps_B, errors_B, step)
