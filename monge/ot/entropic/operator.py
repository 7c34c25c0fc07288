"""The solve as one operator of torch, with its implicit gradient, so that torch.compile sees no graph break.

Shapes: B problems, T rows, E columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from monge.ot.distributed import RowGroup
from monge.ot.entropic.adjoint import mass_gradients, plan_gradients
from monge.ot.entropic.solver import Solution, solve


@torch.library.custom_op("monge::sinkhorn", mutates_args=())
def _sinkhorn(
    scores: Tensor, row_mass: Tensor, col_mass: Tensor, epsilon: float, tol: float, max_iters: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    solution = solve(scores, row_mass, col_mass, epsilon, tol, max_iters)
    return tuple(x.contiguous() for x in solution)  # type: ignore[return-value]


@_sinkhorn.register_fake
def _(scores, row_mass, col_mass, epsilon, tol, max_iters):
    batch = (scores.shape[0],)
    return (
        scores.new_empty(scores.shape),
        row_mass.new_empty(row_mass.shape),
        col_mass.new_empty(col_mass.shape),
        row_mass.new_empty(batch, dtype=torch.int64),
        row_mass.new_empty(batch),
        row_mass.new_empty(batch),
        row_mass.new_empty(batch, dtype=torch.bool),
    )


@torch.library.custom_op("monge::sinkhorn_gradients", mutates_args=())
def _sinkhorn_gradients(
    plan: Tensor, grad: Tensor, row_mass: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = plan_gradients(plan, grad, row_mass, epsilon)
    return tuple(x.contiguous() for x in gradients)  # type: ignore[return-value]


@_sinkhorn_gradients.register_fake
def _(plan, grad, row_mass, epsilon):
    columns = plan.shape[:1] + plan.shape[2:]
    return plan.new_empty(plan.shape), row_mass.new_empty(row_mass.shape), row_mass.new_empty(columns)


def _save(ctx, inputs, output):
    _, row_mass, col_mass, ctx.epsilon, _, _ = inputs
    ctx.save_for_backward(output[0], row_mass, col_mass)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_plan, *_):
    if grad_plan is None:
        return (None,) * 6
    plan, row_mass, col_mass = ctx.saved_tensors
    grad_scores, x, y = _sinkhorn_gradients(plan, grad_plan, row_mass, ctx.epsilon)
    of_masses = mass_gradients(x, y, row_mass, col_mass) if any(ctx.needs_input_grad[1:3]) else (None, None)
    return (grad_scores, *of_masses, None, None, None)


_sinkhorn.register_autograd(_backward, setup_context=_save)


class _GroupSinkhorn(torch.autograd.Function):
    """The same over the ranks of a process group, which an operator's schema cannot carry."""

    @staticmethod
    def forward(ctx, scores, row_mass, col_mass, epsilon, tol, max_iters, rows):
        solution = solve(scores, row_mass, col_mass, epsilon, tol, max_iters, rows)
        ctx.epsilon, ctx.rows = epsilon, rows
        ctx.save_for_backward(solution.plan, row_mass, col_mass)
        ctx.mark_non_differentiable(*solution[1:])
        return tuple(solution)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_plan, *_):
        plan, row_mass, col_mass = ctx.saved_tensors
        grad_scores, x, y = plan_gradients(plan, grad_plan, row_mass, ctx.epsilon, ctx.rows)
        of_masses = mass_gradients(x, y, row_mass, col_mass, ctx.rows)
        return (grad_scores, *of_masses, None, None, None, None)


def solve_implicit(
    scores: Tensor,
    row_mass: Tensor,
    col_mass: Tensor,
    epsilon: float,
    tol: float,
    max_iters: int,
    group: dist.ProcessGroup | None,
) -> Solution:
    """:func:`~monge.ot.entropic.solver.solve`, whose plan carries the implicit gradient."""
    if group is None:
        return Solution(*_sinkhorn(scores, row_mass, col_mass, epsilon, tol, max_iters))
    return Solution(
        *_GroupSinkhorn.apply(scores, row_mass, col_mass, epsilon, tol, max_iters, RowGroup(group))
    )
