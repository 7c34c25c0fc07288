"""The loss of fine-tuning, 2 KL(teacher || student) + cross-entropy, without ever holding all logits.

Both distributions share a softmax with the gradient, so a chunk of tokens costs three matrix products with
the vocabulary: the teacher's logits, the student's, and the gradient back. It is taken in the forward, when
the chunk's probabilities are at hand.

Shapes: T tokens (t of them in a chunk), H model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from monge.conversion.teacher import Head

KL_WEIGHT = 2.0
CE_WEIGHT = 1.0
IGNORED = -100  # target of a token that has none
CHUNK_BYTES = 24 * 2**20  # of one (t, V) matrix: small enough for the C library to reuse, and for an L3 cache


class Losses(NamedTuple):
    """In nats a token: ``total`` = 2 ``kl`` + ``ce`` is differentiable, its parts are not."""

    total: Tensor
    kl: Tensor
    ce: Tensor


def distillation_loss(
    hidden_TH: Tensor, head: Head, teacher_TH: Tensor, teacher_head: Head, targets_T: Tensor
) -> Losses:
    """``2 mean_t KL(p_t || q_t) - mean_t log q_t(target_t)``, p the teacher's distribution, q the student's.

    The KL is over all T tokens, the cross-entropy over those whose target is not `IGNORED`. The gradient with
    respect to the logits of a token is ``(2 (q - p) / T + (q - onehot) / T')``, T' tokens having a target.
    Heads are constants: they get no gradient.

    Args:
        hidden_TH: the student's last hidden states, any floating dtype.
        head: the student's.
        teacher_TH: the teacher's last hidden states, any floating dtype.
        teacher_head: the teacher's; computed in its own weight's dtype.
        targets_T: int64, the next token of each, or `IGNORED`.

    Source: arXiv 2606.01666 (weights 2 and 1).

    Examples:
        >>> import torch
        >>> from monge.conversion.distillation import distillation_loss
        >>> from monge.conversion.teacher import Head
        >>> head, x_TH = Head(torch.randn(11, 4)), torch.randn(3, 4)
        >>> losses = distillation_loss(x_TH, head, x_TH, head, torch.tensor([1, 5, -100]))
        >>> bool(losses.kl.abs() < 1e-6), bool(losses.total == 2 * losses.kl + losses.ce)
        (True, True)
    """
    total, kl, ce = _DistillationLoss.apply(hidden_TH, head, teacher_TH, teacher_head, targets_T)
    return Losses(total, kl, ce)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_TH: Tensor, head: Head, teacher_TH: Tensor, teacher_head: Head, targets_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_VH, T = head.weight_VH, len(hidden_TH)
        has_target_T = targets_T != IGNORED
        num_targets = max(1, int(has_target_T.sum()))
        kl, ce = weight_VH.new_zeros(()), weight_VH.new_zeros(())
        grad_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK_BYTES // (len(weight_VH) * weight_VH.element_size()))
        for start in range(0, T, size):
            chunk = slice(start, start + size)
            p_tV, log_p_tV, _ = _distribution(teacher_head, teacher_TH[chunk])
            q_tV, log_q_tV, slope_tV = _distribution(head, hidden_TH[chunk])
            rows = torch.where(has_target_T[chunk])[0]
            places = rows, targets_T[chunk][rows]
            ce -= log_q_tV[places].sum()
            kl += torch.dot(p_tV.flatten(), log_p_tV.sub_(log_q_tV).flatten())
            if grad_TH is None:
                continue
            weight_t = KL_WEIGHT / T + has_target_T[chunk].to(q_tV.dtype) * (CE_WEIGHT / num_targets)
            grad_tV = q_tV.mul_(weight_t[:, None]).sub_(p_tV, alpha=KL_WEIGHT / T)
            grad_tV[places] -= CE_WEIGHT / num_targets
            if slope_tV is not None:
                grad_tV.mul_(slope_tV)
            grad_TH[chunk] = (grad_tV @ weight_VH).mul_(head.scale)
        kl, ce = kl / T, ce / num_targets
        ctx.grad_TH = grad_TH
        ctx.mark_non_differentiable(kl, ce)
        return KL_WEIGHT * kl + CE_WEIGHT * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.grad_TH * grads[0], None, None, None, None


def _distribution(head: Head, hidden_tH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The probabilities, their logarithms, and the slope of the soft cap where there is one."""
    z_tV = head.logits(hidden_tH.to(head.weight_VH.dtype))
    slope_tV = None if head.softcap is None else 1 - (z_tV / head.softcap).square_()
    log_q_tV = z_tV.log_softmax(dim=1)
    return torch.exp(log_q_tV, out=z_tV), log_q_tV, slope_tV
