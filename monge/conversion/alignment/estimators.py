"""Hard choices with the gradients of soft ones.

Shapes: T tokens, N routed experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monge.ot import soft_topk


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard + soft - sg(soft)``: the value of ``hard`` to the bit, the gradient of ``soft``.

    Source: Bengio et al., arXiv 1308.3432.

    Examples:
        >>> import torch
        >>> from monge.conversion.alignment.estimators import straight_through
        >>> soft = torch.tensor([0.3, 0.7], requires_grad=True)
        >>> choice = straight_through(torch.tensor([0.0, 1.0]), soft)
        >>> (choice * torch.tensor([5.0, 2.0])).sum().backward()
        >>> choice.tolist(), soft.grad.tolist()
        ([0.0, 1.0], [5.0, 2.0])
    """
    return _StraightThrough.apply(hard, soft)


def choose_experts(logits_TN: Tensor, k: int, estimator: str, *, temperature: float = 0.1) -> Tensor:
    """R (T, N), 1 for the k experts of largest logit and 0 for the others, with a gradient.

    ``R + s - sg(s)``, where ``estimator`` says which s:

    - ``"soft_topk"``: `monge.ot.soft_topk` at ``temperature``, the entropic transport of the N experts onto
      'chosen' (k) and 'not chosen'. Experts near the margin compete, and with each other alone: no gradient
      raises all logits of a token.
    - ``"softmax"``: the softmax over experts (arXiv 2606.01666). All experts compete, the sure ones too.
    - ``"sigmoid"``: ``sigmoid(z - m)``, m half-way between the k-th and the (k+1)-th logit and constant. Each
      expert on its own; as every expert lowers the loss, logits drift upwards together and apart.

    With k = N there is no choice and no gradient.
    """
    N = logits_TN.shape[1]
    if k == N:
        return torch.ones_like(logits_TN)
    top = logits_TN.detach().topk(k + 1, dim=1)
    hard_TN = torch.zeros_like(logits_TN).scatter_(1, top.indices[:, :k], 1.0)
    if estimator == "soft_topk":
        soft_TN = soft_topk(logits_TN, k, temperature=temperature)
    elif estimator == "softmax":
        soft_TN = logits_TN.softmax(dim=1)
    else:
        soft_TN = torch.sigmoid(logits_TN - top.values[:, k - 1 :].mean(dim=1, keepdim=True))
    return straight_through(hard_TN, soft_TN.to(hard_TN.dtype))


class _StraightThrough(torch.autograd.Function):
    """Adding and subtracting the soft values would round: a mask of 0.99999994 is not a mask."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad
