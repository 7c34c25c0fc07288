"""Make a forward and a backward on plain tensors one differentiable operator, without a graph break.

The number of rows of each expert depends on the data, which a traced graph cannot hold. So every compute path
is a `torch.library.custom_op` with hand-written forward and backward, and this file is the wiring all of them
share: fake implementations, autograd and what is saved. Second derivatives are not defined.

Shapes: T tokens, K slots per token, E experts, H model width, I expert width, J = 2 I (gated) or I,
R = N filled slots, or T K where N is not read from the device (under torch.compile, grouped_mm on an
accelerator).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FORWARD_SCHEMA = (
    "(Tensor hidden, Tensor indices, Tensor weights, Tensor proj_in, Tensor proj_out, str activation, "
    "bool keep, bool padded, Tensor? bias=None) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor? hidden, Tensor indices, Tensor weights, Tensor proj_in, Tensor proj_out, "
    "Tensor pre, str activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class ComputePath(Protocol):
    """out_t = sum_k weights_tk * expert_{indices_tk}(hidden_t), differentiable in all floating arguments.

    ``expert_e(x) = act(x A_e^T + a_e) D_e^T`` with A ``proj_in``, a ``bias`` (none means 0), D ``proj_out``.
    """

    def __call__(
        self,
        hidden_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        proj_in_EJH: Tensor,
        proj_out_EHI: Tensor,
        activation: str,
        bias_EJ: Tensor | None = None,
    ) -> Tensor: ...


def sum_dtype(hidden: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype in which the slots of a token are summed: float32 at least."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weights.dtype), torch.float32)


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    reads_sizes: bool = True,
    rows: Callable[[int, int, int], int] = lambda T, K, E: T * K,
) -> ComputePath:
    """Register ``monge::experts_<name>`` and return it as a `ComputePath`.

    Args:
        forward: called as in ``FORWARD_SCHEMA``; returns the output (T, H) and, when ``keep``, the
            pre-activations (R, J) sorted by expert (an empty tensor otherwise). When ``padded``, R is T K.
        backward: called as in ``BACKWARD_SCHEMA``; returns the gradients of hidden, weights, proj_in,
            proj_out and bias, empty tensors where ``needs`` is False. hidden is None if proj_in needs no
            gradient.
        reads_sizes: False for a path that reads no size from an accelerator: it is padded there.
        rows: of T, K, E, those of the pre-activations where they are padded.
    """
    forward, backward = _outside_autocast(forward), _outside_autocast(backward)
    forward_op = torch.library.custom_op(
        f"monge::experts_{name}", forward, mutates_args=(), schema=FORWARD_SCHEMA
    )
    backward_op = torch.library.custom_op(
        f"monge::experts_{name}_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA
    )

    @forward_op.register_fake
    def _(hidden, indices, weights, proj_in, proj_out, activation, keep, padded, bias=None):  # type: ignore[no-untyped-def]
        T, K = indices.shape
        kept = rows(T, K, proj_in.shape[0]) if keep else 0
        return torch.empty_like(hidden), hidden.new_empty((kept, proj_in.shape[1]))

    @backward_op.register_fake
    def _(grad, hidden, indices, weights, proj_in, proj_out, pre, activation, needs):  # type: ignore[no-untyped-def]
        return empty_gradients(grad, weights, proj_in, proj_out, needs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, indices, weights, proj_in, proj_out, activation, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for the gradient of the pre-activations
        needs = ctx.needs_input_grad
        ctx.needs = [needs[0], needs[2], needs[3], needs[4], needs[8]]
        ctx.activation = activation
        # hidden is needed only for the gradient of the input projection
        ctx.save_for_backward(hidden if needs[3] else None, indices, weights, proj_in, proj_out, output[1])

    def differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        grads = backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.needs)
        hidden, weights, proj_in, proj_out, bias = (g if n else None for g, n in zip(grads, ctx.needs))
        return hidden, None, weights, proj_in, proj_out, None, None, None, bias

    torch.library.register_autograd(f"monge::experts_{name}", differentiate, setup_context=setup_context)

    def path(
        hidden_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        proj_in_EJH: Tensor,
        proj_out_EHI: Tensor,
        activation: str,
        bias_EJ: Tensor | None = None,
    ) -> Tensor:
        floats = (hidden_TH, weights_TK, proj_in_EJH, proj_out_EHI, bias_EJ)
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
        traced = torch.compiler.is_compiling()
        padded = traced or (not reads_sizes and hidden_TH.device.type != "cpu")
        # where nobody records what is computed, the operator would only take time
        run = forward_op if keep or traced or _is_watched(hidden_TH, indices_TK, *floats[1:]) else forward
        return run(
            hidden_TH, indices_TK, weights_TK, proj_in_EJH, proj_out_EHI, activation, keep, padded, bias_EJ
        )[0]

    path.__name__ = path.__qualname__ = name
    return path


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has chosen the dtype of the inputs; that of the products in here is the path's to choose."""

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return function(first, *others)
        with torch.autocast(device, enabled=False):
            return function(first, *others)

    return run


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether a tensor subclass, a dispatch mode or a transform of `torch.func` wants to see the operator."""
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and type(x) not in (Tensor, Parameter) for x in tensors)


def empty_gradients(
    grad: Tensor,
    weights: Tensor,
    proj_in: Tensor,
    proj_out: Tensor,
    needs: Sequence[bool],
    new: Callable[[Tensor, Sequence[int]], Tensor] = Tensor.new_empty,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of hidden, weights, proj_in, proj_out and bias; empty where none is needed."""
    like = (grad, weights, proj_in, proj_out, proj_in[:, :, 0])
    hidden, gates, a, d, bias = (new(x, x.shape if n else (0,)) for x, n in zip(like, needs))
    return hidden, gates, a, d, bias
