"""The sweeps in plain torch, in the log domain: any device, any batch, and differentiable.

With the columns' log potentials fixed, the best row scaling is a softmax, so the plan is
``row_mass_t * softmax_e(S_te / epsilon + log_v_e)``. The compiled forms of the CPU compute the same.

Shapes: B problems, T rows, E columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LogDomain:
    """Row-scaled plans for given column potentials.

    Args:
        scores_BTE: finite or -inf; the dtype of the work.
        row_mass_BT: in the dtype in which sums accumulate.
        epsilon: the regularisation.
    """

    def __init__(self, scores_BTE: Tensor, row_mass_BT: Tensor, epsilon: float) -> None:
        self.scores_BTE = scores_BTE
        self.row_mass_BT = row_mass_BT
        self.epsilon = epsilon

    def column_sums(self, log_v_BE: Tensor) -> Tensor:
        """(B, E): the column sums of the row-scaled plan."""
        softmax_BTE = torch.softmax(self._log_kernel(log_v_BE, self.epsilon), -1)
        return self._scale(softmax_BTE, self.row_mass_BT).sum(-2, dtype=log_v_BE.dtype)

    def into_plan(self, log_v_BE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The row-scaled plan (B, T, E), the rows' log potentials (B, T) and the plan's row sums (B, T)."""
        log_kernel_BTE = self._log_kernel(log_v_BE, self.epsilon)
        plan_BTE = self._scale(torch.softmax(log_kernel_BTE, -1), self.row_mass_BT)
        log_sum_BT = torch.logsumexp(log_kernel_BTE.detach(), -1).to(log_v_BE.dtype)
        return plan_BTE, self.row_mass_BT.detach().log() - log_sum_BT, plan_BTE.detach().sum(-1)

    def moments(self, log_v_BE: Tensor, epsilon_B: Tensor) -> tuple[Tensor, Tensor]:
        """Column sums (B, E) of the plan P and ``P^T diag(r)^-1 P`` (B, E, E), each at its own epsilon."""
        root_BT = self.row_mass_BT.sqrt()
        softmax_BTE = torch.softmax(self._log_kernel(log_v_BE, epsilon_B[:, None, None]), -1)
        half_BTE = self._scale(softmax_BTE, root_BT).to(log_v_BE.dtype)
        return (half_BTE.mT @ root_BT.unsqueeze(-1)).squeeze(-1), half_BTE.mT @ half_BTE

    def _log_kernel(self, log_v_BE: Tensor, epsilon: float | Tensor) -> Tensor:
        return (self.scores_BTE / epsilon).to(self.scores_BTE.dtype) + log_v_BE.unsqueeze(-2).to(
            self.scores_BTE.dtype
        )

    @staticmethod
    def _scale(softmax_BTE: Tensor, scale_BT: Tensor) -> Tensor:
        return softmax_BTE * scale_BT.unsqueeze(-1).to(softmax_BTE.dtype)
