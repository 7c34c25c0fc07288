"""The implicit gradient of a transport plan: one E x E system in place of a walk back through the iterations.

At the optimum the plan P satisfies ``P 1 = r``, ``P^T 1 = c``. Let G be the gradient that reaches P, ``W = P
* G``, and x (T,), y (E,) the multipliers of the two marginals:

    diag(r) x + P y = W 1,        P^T x + diag(c) y = W^T 1.

Eliminating x leaves the E x E system ``(diag(c) - P^T diag(r)^-1 P) y = W^T 1 - P^T diag(r)^-1 W 1``. Then

    dL/dS = (W - P * (x + y)) / epsilon,        dL/dr = x,        dL/dc = y.

Shapes: B problems, T rows, E columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monge.ot.distributed import LOCAL, RowGroup
from monge.ot.entropic import cpu_adjoint
from monge.ot.entropic.laplacian import solve_laplacian


def plan_gradients(
    plan_BTE: Tensor, grad_BTE: Tensor, row_mass_BT: Tensor, epsilon: float, rows: RowGroup = LOCAL
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient with respect to the scores, and the multipliers x (B, T) and y (B, E).

    Args:
        plan_BTE: the plan.
        grad_BTE: the gradient of the loss with respect to it.
        row_mass_BT: row masses; only their dtype counts, in which sums accumulate.
        epsilon: the regularisation.
        rows: the ranks among which the rows are spread.
    """
    E = plan_BTE.shape[-1]
    compiled = plan_BTE.device.type == "cpu"
    plan_BTE, grad_BTE = plan_BTE.detach().contiguous(), grad_BTE.detach().contiguous()
    totals_of = _compiled_totals if compiled else _totals
    system_BEX, row_BT2 = totals_of(plan_BTE, grad_BTE, row_mass_BT)
    gram_BEE, sums_BE1, right_BE1 = rows.sum(system_BEX).split([E, 1, 1], -1)
    sums_BE, right_BE = sums_BE1.squeeze(-1), right_BE1.squeeze(-1)
    y_BE = solve_laplacian(gram_BEE, sums_BE, right_BE, weight_BE=sums_BE)
    gradient_of = _compiled_scores_gradient if compiled else _scores_gradient
    grad_scores_BTE, x_BT = gradient_of(plan_BTE, grad_BTE, row_BT2, y_BE, epsilon)
    return grad_scores_BTE, x_BT, y_BE


def mass_gradients(
    x_BT: Tensor, y_BE: Tensor, row_mass_BT: Tensor, col_mass_BE: Tensor, rows: RowGroup = LOCAL
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the masses as the caller gave them, from the multipliers.

    The column masses were rescaled to the total of the row masses on the way in; their gradient includes
    that. A row or column without mass is no part of the problem, and its gradient is zero.
    """
    # col_mass_BE * total(row_mass) / total(col_mass) is what the columns were held to.
    row_total_B1 = rows.sum(row_mass_BT.sum(-1, keepdim=True))
    col_total_B1 = col_mass_BE.sum(-1, keepdim=True)
    safe_total_B1 = torch.where(col_total_B1 > 0, col_total_B1, 1.0)
    mean_y_B1 = (y_BE * col_mass_BE).sum(-1, keepdim=True) / safe_total_B1
    grad_row_BT = torch.where(row_mass_BT > 0, x_BT + mean_y_B1, 0.0)
    grad_col_BE = torch.where(col_mass_BE > 0, (y_BE - mean_y_B1) * (row_total_B1 / safe_total_B1), 0.0)
    return grad_row_BT, grad_col_BE


def _totals(plan_BTE: Tensor, grad_BTE: Tensor, row_mass_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The system (B, E, E + 2), gram, column sums, right side; and each row's 1 / sum(P) and sum(W)."""
    plan_BTE = plan_BTE.to(row_mass_BT.dtype)
    weighted_BTE = plan_BTE * grad_BTE
    row_sums_BT1 = plan_BTE.sum(-1, keepdim=True)
    inverse_BT1 = torch.where(row_sums_BT1 > 0, row_sums_BT1, torch.inf).reciprocal()
    weighted_BT1 = weighted_BTE.sum(-1, keepdim=True)
    half_BTE = plan_BTE * inverse_BT1.sqrt()
    right_BE = (weighted_BTE - plan_BTE * (inverse_BT1 * weighted_BT1)).sum(-2)
    system_BEX = torch.cat([half_BTE.mT @ half_BTE, torch.stack([plan_BTE.sum(-2), right_BE], -1)], -1)
    return system_BEX, torch.cat([inverse_BT1, weighted_BT1], -1)


def _scores_gradient(
    plan_BTE: Tensor, grad_BTE: Tensor, row_BT2: Tensor, y_BE: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The gradient of the scores (B, T, E) and the rows' multipliers (B, T)."""
    inverse_BT, weighted_BT = row_BT2.unbind(-1)
    x_BT = inverse_BT * (weighted_BT - (plan_BTE.to(y_BE.dtype) @ y_BE.unsqueeze(-1)).squeeze(-1))
    multipliers_BTE = x_BT.unsqueeze(-1) + y_BE.unsqueeze(-2)
    return (plan_BTE * (grad_BTE - multipliers_BTE) / epsilon).to(plan_BTE.dtype), x_BT


def _compiled_totals(plan_BTE: Tensor, grad_BTE: Tensor, row_mass_BT: Tensor) -> tuple[Tensor, Tensor]:
    B, T, E = plan_BTE.shape
    row_BT2 = torch.empty(B, T, 2, dtype=torch.float64)
    system_BEX = torch.empty(B, E, E + 2, dtype=torch.float64)
    for b in range(B):
        system_BEX[b] = cpu_adjoint.totals(plan_BTE[b], grad_BTE[b], row_BT2[b])
    return system_BEX, row_BT2


def _compiled_scores_gradient(
    plan_BTE: Tensor, grad_BTE: Tensor, row_BT2: Tensor, y_BE: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    grad_scores_BTE, x_BT = torch.empty_like(plan_BTE), torch.empty(plan_BTE.shape[:2], dtype=torch.float64)
    for b in range(plan_BTE.shape[0]):
        cpu_adjoint.scores_gradient(
            plan_BTE[b], grad_BTE[b], row_BT2[b], y_BE[b], epsilon, grad_scores_BTE[b], x_BT[b]
        )
    return grad_scores_BTE, x_BT
