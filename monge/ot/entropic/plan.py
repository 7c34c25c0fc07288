"""Entropic optimal transport between rows and columns: the public entry and its result.

Shapes: T rows, E columns, ... any leading batch dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from monge.ot.entropic.operator import solve_implicit
from monge.ot.entropic.solver import solve_unrolled

BACKWARDS = ("implicit", "unrolled", "none")


@dataclass(frozen=True, slots=True)
class TransportPlan:
    """The plan ``diag(u) exp(S / epsilon) diag(v)`` and how well it keeps its marginals.

    Only ``plan`` carries gradients. The figures are tensors, so that nothing waits for an accelerator; those
    of a problem without batch dimensions have no dimension and serve as numbers (``int(plan.iterations)``,
    ``if plan.converged``).

    Attributes:
        plan: (..., T, E), float64 for float64 scores, else float32.
        log_u: (..., T) log potentials of the rows; -inf where a row has no mass.
        log_v: (..., E) log potentials of the columns; -inf where a column has no mass, 0 on average
            elsewhere.
        iterations: (...) int64, how many times the columns were summed up.
        row_error: (...) largest distance of a row sum from its mass, in units of the mean row mass. The
            default row mass being 1, an error of 1e-4 is a ten-thousandth of a row.
        col_error: (...) largest distance of a column sum from its mass, in the same unit.
        converged: (...) bool, both errors are at most ``tol``, but for the rounding of the plan's rows.
    """

    plan: Tensor
    log_u: Tensor
    log_v: Tensor
    iterations: Tensor
    row_error: Tensor
    col_error: Tensor
    converged: Tensor


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 1.0,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    mask: Tensor | None = None,
    tol: float = 1e-4,
    max_iters: int = 100,
    backward: str = "implicit",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> TransportPlan:
    """The plan with given row and column sums that maximises score plus entropy.

    ``max_{P >= 0}  <P, S> + epsilon H(P)   subject to   P 1 = r,  P^T 1 = c``

    with ``H(P) = -sum_te P_te (log P_te - 1)``, row masses r and column masses c.

    Sinkhorn's iterations (Cuturi, arXiv 1306.0895) with float64 sums, on the scores as they are or
    exponentiated once, as their spread allows; where they would miss ``tol`` within ``max_iters``, as they do
    for a small epsilon, annealed Newton steps on the semi-dual take over. The plan does not change when a
    constant is added to a row or a column of the scores.

    Args:
        scores: (..., T, E) floating point. -inf forbids a pair. Rows that are masked or without mass may hold
            anything. bfloat16 and float16 are solved as float32.
        epsilon: weight of the entropy, in units of the scores. The larger, the more even the rows of the
            plan.
        row_mass: (T,) or (..., T), at least 0; 1 each by default.
        col_mass: (E,) or (..., E), at least 0; equal by default. It is rescaled to the total of ``row_mass``.
        mask: (T,) or (..., T) bool, True where a row counts. The others get zero mass, zero plan and zero
            gradient.
        tol: stop when both marginal errors are at most this, in units of the mean row mass. 0 asks for
            exactly ``max_iters`` iterations of Sinkhorn.
        max_iters: the most sweeps over the scores, Newton's included.
        backward: ``"implicit"`` solves one E x E system for the gradient of the optimal plan, with respect to
            scores, row masses and column masses; ``"unrolled"`` differentiates plain iterations in the log
            domain, at some T * E float64 numbers of memory each; ``"none"`` returns a detached plan.
        noise: standard deviation of Gaussian noise added to the scores, in their units.
        generator: where the noise comes from.
        group: a process group over whose ranks the rows are spread, any number to each. Column masses must be
            equal on all ranks and hold for all rows together. A forward exchanges messages of O(E) numbers,
            the implicit backward one of E (E + 2). Every rank must call forward and backward; the gradient is
            that of the sum of all ranks' losses, and of ``col_mass`` every rank gets all of it. Newton is not
            used.

    Returns:
        TransportPlan: the plan, its potentials, and its errors. It ends on a row scaling: rows are exact up
            to rounding.

    Raises:
        ValueError: for NaN or +inf scores, masses that are negative or not finite, rows or columns with
            mass and no finite score, and options out of range. Scores whose -inf entries admit no plan in a
            less obvious way come back with ``converged`` False. On an accelerator, where to look at values
            means to wait, only NaN is noticed, and not before the first check of the errors.
        TypeError: for scores, masses or a mask that are no tensors.

    Which ``backward``: implicit, unless ``max_iters`` is so small that the plan stays far from its marginals
    on purpose and the gradient of that very computation is wanted. With ``torch.compile``, implicit and none
    are one operator without graph break, as long as there is no ``group`` and no ``generator``.

    Examples:
        >>> import torch
        >>> from monge.ot import sinkhorn
        >>> scores = torch.tensor([[2.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
        >>> result = sinkhorn(scores, epsilon=0.5, tol=1e-6)
        >>> result.plan.sum(-1), result.plan.sum(-2)
        (tensor([1., 1., 1.]), tensor([1.5000, 1.5000]))
        >>> bool(result.converged), result.plan.argmax(-1).tolist()
        (True, [0, 1, 1])
    """
    _check_options(epsilon, tol, max_iters, backward, noise)
    if backward == "unrolled" and group is not None:
        raise ValueError("backward='unrolled' does not go through a process group: use backward='implicit'")
    _check_scores(scores)
    *batch, T, E = scores.shape
    wide = torch.float32 if scores.device.type == "mps" else torch.float64

    work = scores if scores.dtype == torch.float64 else scores.float()
    if noise > 0:
        jitter = torch.randn(work.shape, dtype=work.dtype, device=work.device, generator=generator)
        work = work + noise * jitter
    row = _expand(row_mass, "row_mass", (*batch, T), scores, wide)
    col = _expand(col_mass, "col_mass", (*batch, E), scores, wide)
    if mask is not None:
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be boolean (True = the row counts), got {mask.dtype}: compare it with 0"
            )
        row = torch.where(_expand(mask, "mask", (*batch, T), scores, torch.bool), row, 0.0)

    B = math.prod(batch)
    work, row, col = work.reshape(B, T, E), row.reshape(B, T), col.reshape(B, E)
    if backward == "none":
        work, row, col = work.detach(), row.detach(), col.detach()
    if backward == "unrolled":
        solution = solve_unrolled(work, row, col, epsilon, tol, max_iters)
    else:
        solution = solve_implicit(work, row, col, epsilon, tol, max_iters, group)
    plan, *rest = (x.reshape([*batch, *x.shape[1:]]) for x in solution)
    return TransportPlan(plan, *(x.detach() for x in rest))


def _expand(
    given: Tensor | None, name: str, shape: tuple[int, ...], scores: Tensor, dtype: torch.dtype
) -> Tensor:
    if given is None:
        return torch.ones(shape, dtype=dtype, device=scores.device)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    if given.ndim == 0 or given.shape[-1] != shape[-1] or given.ndim > len(shape):
        fits = False
    else:
        fits = all(a in (1, b) for a, b in zip(reversed(given.shape), reversed(shape)))
    if not fits:
        shapes = " or ".join(dict.fromkeys([str(shape), f"({shape[-1]},)"]))
        raise ValueError(
            f"{name} must have shape {shapes} for scores of shape {tuple(scores.shape)}, "
            f"got {tuple(given.shape)}"
        )
    return given.to(device=scores.device, dtype=dtype).expand(shape)


def _check_options(epsilon: float, tol: float, max_iters: int, backward: str, noise: float) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(
            f"epsilon must be a positive number, got {epsilon}: it is the temperature of the plan"
        )
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if max_iters < 1:
        raise ValueError(f"max_iters must be at least 1, got {max_iters}")
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(BACKWARDS)}, got {backward!r}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be a standard deviation of at least 0, got {noise}")


def _check_scores(scores: Tensor) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}: convert them with .float()")
    if scores.ndim < 2 or scores.shape[-1] < 1:
        raise ValueError(f"scores must have shape (..., T, E) with E >= 1, got {tuple(scores.shape)}")
