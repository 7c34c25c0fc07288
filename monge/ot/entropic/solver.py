"""One entropic solve from tensors to tensors: look at the problem, choose the form, iterate, report.

Shapes: B problems, T rows, E columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from monge.ot.distributed import LOCAL, RowGroup
from monge.ot.entropic.cpu_forms import CompiledForm
from monge.ot.entropic.iteration import Potentials, Stopping, iterate, largest
from monge.ot.entropic.log_domain import LogDomain
from monge.ot.entropic.problem import Survey, check_masses, column_tops, scale_masses, survey_scores
from monge.ot.entropic.semidual import newton

_KERNEL_SPREAD = 40.0  # exp(-40) is far from float32's underflow; scores wider than this call for log form
_CHECK_EVERY = 10  # sweeps between two looks at the error where a look makes the host wait for the device
_ROUNDING = 16  # units in the last place allowed to a row sum
_NEWTON_ROOM = 40  # sweeps that annealing needs, in all but the hardest cases


class Solution(NamedTuple):
    """What a solve returns; see :class:`~monge.ot.entropic.TransportPlan` for the fields."""

    plan: Tensor
    log_u: Tensor
    log_v: Tensor
    iterations: Tensor
    row_error: Tensor
    col_error: Tensor
    converged: Tensor


def solve(
    scores_BTE: Tensor,
    row_mass_BT: Tensor,
    col_mass_BE: Tensor,
    epsilon: float,
    tol: float,
    max_iters: int,
    rows: RowGroup = LOCAL,
) -> Solution:
    """Solve B problems, not differentiably.

    Scores are float32 or float64, masses in the dtype in which sums accumulate. The column masses need not
    have the rows' total yet. Raises ValueError for values that allow no plan; on an accelerator, where a look
    at values waits for the device, only NaN is noticed, and only at the first look at the errors.
    """
    on_cpu = scores_BTE.device.type == "cpu"
    if on_cpu:
        check_masses(row_mass_BT, col_mass_BE, rows)
    target_BE, unit_B = scale_masses(row_mass_BT, col_mass_BE, rows)
    survey = survey_scores(scores_BTE, row_mass_BT, col_mass_BE, epsilon, rows)
    form = _choose_form(scores_BTE, row_mass_BT, col_mass_BE, survey, epsilon)
    stopping = Stopping(tol, max_iters, unit_B, check_every=1 if on_cpu else _CHECK_EVERY)
    log_mass_BE = col_mass_BE.log()
    start_BE = log_mass_BE - survey.top_BE / epsilon
    give_up_until = max_iters - _NEWTON_ROOM if rows.is_local else 0
    if isinstance(form, CompiledForm) and rows.is_local:
        found = form.iterate(start_BE, target_BE, stopping, give_up_until=give_up_until)
    else:
        found = iterate(
            lambda log_v_BE: rows.sum(form.column_sums(log_v_BE)),
            start_BE,
            target_BE,
            stopping,
            give_up_until=give_up_until,
        )
    left = max_iters - found.spent
    if left >= _NEWTON_ROOM and rows.is_local and stopping.worst(found.errors_B) > tol:
        if isinstance(form, CompiledForm) and form.as_kernel:
            form = CompiledForm(scores_BTE, row_mass_BT, epsilon)
        polished = newton(
            form,
            log_mass_BE,
            survey.top_BE,
            target_BE,
            replace(stopping, max_iters=left),
            epsilon=epsilon,
            spread=survey.spread(),
        )
        found = _better(found, polished, tol)
    return _report(form, found, scores_BTE, row_mass_BT, stopping, rows)


def solve_unrolled(
    scores_BTE: Tensor, row_mass_BT: Tensor, col_mass_BE: Tensor, epsilon: float, tol: float, max_iters: int
) -> Solution:
    """:func:`solve` by plain iterations in torch's log domain; the plan carries their gradient."""
    if scores_BTE.device.type == "cpu":
        check_masses(row_mass_BT, col_mass_BE, LOCAL)
    # What has no mass is no part of the problem and gets no gradient, as in the implicit backward.
    row_mass_BT = torch.where(row_mass_BT > 0, row_mass_BT, 0.0)
    col_mass_BE = torch.where(col_mass_BE > 0, col_mass_BE, 0.0)
    target_BE, unit_B = scale_masses(row_mass_BT, col_mass_BE, LOCAL)
    # The survey is for its errors alone: the start below needs a gradient.
    survey_scores(scores_BTE.detach(), row_mass_BT.detach(), col_mass_BE.detach(), epsilon, LOCAL)
    form = _log_domain(scores_BTE, row_mass_BT, epsilon)
    stopping = Stopping(tol, max_iters, unit_B.detach())
    live_BE = col_mass_BE > 0
    log_mass_BE = torch.where(live_BE, torch.where(live_BE, col_mass_BE, 1.0).log(), -torch.inf)
    # Its gradient counts: one sweep from there may already be enough.
    start_BE = log_mass_BE - column_tops(scores_BTE, row_mass_BT) / epsilon
    found = iterate(form.column_sums, start_BE, target_BE, stopping)
    return _report(form, found, scores_BTE, row_mass_BT, stopping, LOCAL)


def _choose_form(
    scores_BTE: Tensor, row_mass_BT: Tensor, col_mass_BE: Tensor, survey: Survey, epsilon: float
) -> CompiledForm | LogDomain:
    if scores_BTE.device.type != "cpu":
        return _log_domain(scores_BTE, row_mass_BT, epsilon)
    log_mass_BE = col_mass_BE.log()
    lowest_B = torch.where(col_mass_BE > 0, log_mass_BE, torch.inf).amin(-1)
    mass_range = largest(log_mass_BE.amax(-1) - lowest_B)
    if not survey.holes and survey.spread() / epsilon + mass_range <= _KERNEL_SPREAD:
        return CompiledForm(scores_BTE, row_mass_BT, epsilon, survey.top_BE)
    return CompiledForm(scores_BTE, row_mass_BT, epsilon)


def _log_domain(scores_BTE: Tensor, row_mass_BT: Tensor, epsilon: float) -> LogDomain:
    """The form in torch, widened: in float32, score / epsilon lacks digits when epsilon is small."""
    safe_BTE = torch.where(row_mass_BT.unsqueeze(-1) > 0, scores_BTE, 0.0)
    return LogDomain(safe_BTE.to(row_mass_BT.dtype), row_mass_BT, epsilon)


def _better(plain: Potentials, polished: Potentials, tol: float) -> Potentials:
    """Problem by problem what plain iterations reached if that will do, else the smaller error."""
    keep_B = (plain.errors_B <= tol) | (plain.errors_B <= polished.errors_B)
    finished_B = plain.errors_B <= tol
    return Potentials(
        torch.where(keep_B.unsqueeze(-1), plain.log_v_BE, polished.log_v_BE),
        plain.sweeps_B + torch.where(finished_B, 0, polished.sweeps_B),
        torch.where(keep_B, plain.errors_B, polished.errors_B),
        plain.spent + polished.spent,
    )


def _report(
    form: CompiledForm | LogDomain,
    found: Potentials,
    scores_BTE: Tensor,
    row_mass_BT: Tensor,
    stopping: Stopping,
    rows: RowGroup,
) -> Solution:
    plan_BTE, log_u_BT, row_sums_BT = form.into_plan(found.log_v_BE)
    plan_BTE = plan_BTE.to(scores_BTE.dtype)
    mass_BT = row_mass_BT.detach()
    deviation_BT = (row_sums_BT - mass_BT).abs()
    # A row of the plan keeps its sum up to the rounding of its entries, which no iteration can mend.
    excess_BT = torch.sub(deviation_BT, mass_BT, alpha=_ROUNDING * torch.finfo(plan_BTE.dtype).eps)
    worst_2B = mass_BT.new_zeros(2, len(mass_BT))  # a rank may hold no rows
    if mass_BT.shape[1]:
        worst_2B = torch.stack([deviation_BT.amax(-1), excess_BT.amax(-1).clamp_min(0)])
    row_error_B, row_excess_B = rows.max(worst_2B) / stopping.unit_B
    # Potentials are free up to a constant: those of the columns shall average 0.
    log_v_BE = found.log_v_BE.detach()
    live_BE = log_v_BE > -torch.inf
    live_B1 = live_BE.sum(-1, keepdim=True).clamp_min(1)
    mean_B1 = torch.where(live_BE, log_v_BE, 0.0).sum(-1, keepdim=True) / live_B1
    return Solution(
        plan_BTE,
        log_u_BT + mean_B1,
        log_v_BE - mean_B1,
        found.sweeps_B,
        row_error_B,
        found.errors_B,
        (row_excess_B <= stopping.tol) & (found.errors_B <= stopping.tol),
    )
