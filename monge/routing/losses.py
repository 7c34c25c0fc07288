"""Auxiliary losses of routing as pure functions of logits and choices.

Shapes: T tokens, E experts, K slots per token, B sequences of L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monge.routing.types import expert_loads


def load_balance_loss(probs_TE: Tensor, shares_E: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e * mean_t P_te``: 1 when balanced, up to E when one expert takes all.

    ``f`` carries no gradient, it says which probabilities to lower. Zero when no token is valid.

    Args:
        probs_TE: (T, E) router probabilities.
        shares_E: (E,) share of the slots that each expert received, sum 1 (see ``slot_shares``).
        mask: (T,) True where a token is valid.

    Source: arXiv 2101.03961, eq. 4 (Switch), there for k = 1; arXiv 2006.16668, section 2.2 (GShard).

    Examples:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> round(load_balance_loss(probs, torch.tensor([1.0, 0.0])).item(), 4)
        1.5
    """
    return probs_TE.shape[1] * (shares_E.detach() * masked_mean(probs_TE, mask)).sum()


def sequence_balance_loss(
    probs_TE: Tensor, indices_TK: Tensor, length: int, *, mask: Tensor | None = None
) -> Tensor:
    """Mean of ``load_balance_loss`` over the sequences of ``length`` tokens, each with its own shares.

    Source: arXiv 2412.19437, eq. 17 to 20 (DeepSeek-V3's sequence-wise loss, here on P normalised over
    experts).
    """
    T, E = probs_TE.shape
    if T == 0:
        return probs_TE.sum()
    valid_BL = torch.ones(T, device=probs_TE.device) if mask is None else mask.to(torch.float32)
    valid_BL = valid_BL.reshape(-1, length)
    probs_BE = (probs_TE.reshape(-1, length, E) * valid_BL[..., None]).sum(1)
    slots_BLK = indices_TK.reshape(-1, length, indices_TK.shape[1])
    slots_BS = torch.where(valid_BL[..., None] > 0, slots_BLK, -1).flatten(1)
    loads_BE = torch.zeros(len(slots_BS), E + 1, dtype=torch.int64, device=slots_BS.device)
    loads_BE = loads_BE.scatter_add_(1, slots_BS + 1, torch.ones_like(slots_BS))[:, 1:]
    shares_BE = loads_BE / loads_BE.sum(1, keepdim=True).clamp(min=1)
    per_sequence_B = E * (shares_BE * probs_BE).sum(1) / valid_BL.sum(1).clamp(min=1)
    return per_sequence_B.sum() / (valid_BL.sum(1) > 0).sum().clamp(min=1)


def z_loss(logits_TE: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``mean_t (log sum_e exp Z_te)^2``, which keeps the logits small. Zero when no token is valid.

    Source: arXiv 2202.08906, eq. 5 (ST-MoE; coefficient 1e-3 there).

    Examples:
        >>> import torch
        >>> round(z_loss(torch.zeros(3, 4)).item(), 4)  # log(4)^2
        1.9218
    """
    return masked_mean(logits_TE.logsumexp(dim=1).square(), mask)


def squared_cv(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, ``var / mean^2``: 0 when all are equal, also when all are zero."""
    mean = values_E.mean()
    return (values_E - mean).square().mean() / mean.square().clamp(min=1e-20)


def slot_shares(indices_TK: Tensor, num_experts: int, *, mask: Tensor | None = None) -> Tensor:
    """(E,) float32, the share of the filled slots of valid tokens that each expert received."""
    if mask is not None:
        indices_TK = torch.where(mask[:, None], indices_TK, -1)
    loads_E = expert_loads(indices_TK, num_experts)
    return loads_E / loads_E.sum().clamp(min=1)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the first dimension where ``mask`` (T,) is True; zero, not NaN, when that is nowhere."""
    if mask is None:
        return values.sum(0) / max(len(values), 1)
    weights = mask.to(values.dtype)
    return (values * weights.view(-1, *[1] * (values.dim() - 1))).sum(0) / weights.sum().clamp(min=1)
