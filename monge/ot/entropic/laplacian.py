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
from torch.nn import functional as nnf


def solve_laplacian(gram_BEE: Tensor, sums_BE: Tensor, right_BE: Tensor, weight_BE: Tensor) -> Tensor:
    """y with ``(diag(sums) - gram) y = right`` and ``sum(weight * y) = 0``; y is 0 where the weight is.

    Args:
        gram_BEE: ``P^T diag(r)^-1 P``.
        sums_BE: its row sums, the column sums of P.
        right_BE: a right side that sums to 0.
        weight_BE: the scaling, at least of the size of ``sums_BE``.
    """
    ridge = 4096 * torch.finfo(gram_BEE.dtype).eps
    scale_BE = torch.where(weight_BE > 0, weight_BE, torch.inf).rsqrt()
    live_BE = scale_BE > 0
    constant_BE = nnf.normalize(weight_BE.sqrt(), dim=-1)
    matrix_BEE = constant_BE.unsqueeze(-1) * constant_BE.unsqueeze(-2)
    matrix_BEE.addcmul_(gram_BEE * scale_BE.unsqueeze(-2), scale_BE.unsqueeze(-1), value=-1)
    # A column without weight gets a row and column of its own.
    degree_BE = torch.where(live_BE, sums_BE * scale_BE.square(), 1.0)
    matrix_BEE.diagonal(dim1=-2, dim2=-1).add_(degree_BE).add_(ridge)
    factor_BEE, _ = torch.linalg.cholesky_ex(matrix_BEE)
    right_BE1 = (right_BE * scale_BE).unsqueeze(-1)
    y_BE1 = torch.cholesky_solve(right_BE1, factor_BEE)
    missed_BE1 = torch.baddbmm(right_BE1 + ridge * y_BE1, matrix_BEE, y_BE1, alpha=-1)
    y_BE1 = y_BE1 + torch.cholesky_solve(missed_BE1, factor_BEE)
    return y_BE1.squeeze(-1) * scale_BE
