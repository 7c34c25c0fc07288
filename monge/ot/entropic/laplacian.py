"""The E x E system behind Newton's step and the implicit gradient.

For a plan P with row sums r and column sums c, ``diag(c) - P^T diag(r)^-1 P`` is the Laplacian of a weighted
graph on the columns. Constants are in its null space (potentials are free up to one), and it is nearly
singular further where the plan nearly falls apart into blocks. Scaled on both sides its spectrum lies in [0,
1], so that a fixed small ridge keeps a Cholesky factorisation sound, and one step of iterative refinement
takes the ridge's effect back.

Shapes: B problems, E columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_laplacian(gram_BEE: Tensor, sums_BE: Tensor, right_BE: Tensor, weight_BE: Tensor) -> Tensor:
    """y with ``(diag(sums) - gram) y = right`` and ``sum(weight * y) = 0``; y is 0 where the weight is.

    Args:
        gram_BEE: ``P^T diag(r)^-1 P``.
        sums_BE: its row sums, the column sums of P.
        right_BE: a right side that sums to 0.
        weight_BE: the scaling, at least of the size of ``sums_BE``.
    """
    ridge = 4096 * torch.finfo(gram_BEE.dtype).eps
    root_BE = weight_BE.sqrt()
    scale_BE = torch.where(root_BE > 0, root_BE, torch.inf).reciprocal()
    total_B11 = weight_BE.sum(-1)[:, None, None]
    constants_BEE = root_BE.unsqueeze(-1) * root_BE.unsqueeze(-2) / torch.where(total_B11 > 0, total_B11, 1.0)
    laplacian_BEE = torch.diag_embed(sums_BE) - (gram_BEE + gram_BEE.mT) / 2
    matrix_BEE = laplacian_BEE * scale_BE.unsqueeze(-1) * scale_BE.unsqueeze(-2) + constants_BEE
    # A column without weight gets a row and column of its own.
    matrix_BEE = matrix_BEE + torch.diag_embed((root_BE == 0).to(root_BE.dtype))
    eye_EE = torch.eye(root_BE.shape[-1], dtype=root_BE.dtype, device=root_BE.device)
    factor_BEE, _ = torch.linalg.cholesky_ex(matrix_BEE + ridge * eye_EE)
    right_BE1 = (right_BE * scale_BE).unsqueeze(-1)
    y_BE1 = torch.cholesky_solve(right_BE1, factor_BEE)
    y_BE1 = y_BE1 + torch.cholesky_solve(right_BE1 - matrix_BEE @ y_BE1, factor_BEE)
    return y_BE1.squeeze(-1) * scale_BE
