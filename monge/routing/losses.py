"""Auxiliary losses of routing as pure functions of logits and choices.

Shapes: T tokens, E experts, K slots per token, B sequences of L tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from monge.ot.distributed import LOCAL, RowGroup
from monge.routing.types import expert_loads


def load_balance_loss(
    probs_TE: Tensor, shares_E: Tensor, *, mask: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """``E * sum_e f_e * mean_t P_te``: 1 when balanced, up to E when one expert takes all.

    ``f`` carries no gradient, it says which probabilities to lower. Zero when no token is valid.

    Args:
        probs_TE: (T, E) router probabilities.
        shares_E: (E,) share of the slots that each expert received, sum 1 (see ``slot_shares``).
        mask: (T,) True where a token is valid.
        count: scalar, the number of tokens that the mean divides by, if it is not those of this batch.

    Source: arXiv 2101.03961, eq. 4 (Switch), there for k = 1; arXiv 2006.16668, section 2.2 (GShard).

    Examples:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> round(load_balance_loss(probs, torch.tensor([1.0, 0.0])).item(), 4)
        1.5
    """
    return (
        probs_TE.shape[1] * (shares_E.detach().to(probs_TE.dtype) * masked_mean(probs_TE, mask, count)).sum()
    )


def sequence_balance_loss(
    probs_TE: Tensor,
    indices_TK: Tensor,
    length: int,
    *,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean of ``load_balance_loss`` over the sequences of ``length`` tokens, each with its own shares.

    With ``group``, its ranks' losses have the mean over all their sequences as their mean.

    Source: arXiv 2412.19437, eq. 17 to 20 (DeepSeek-V3's sequence-wise loss, here on P normalised over
    experts).
    """
    T, E = probs_TE.shape
    rows = RowGroup(group)
    if T == 0:
        rows.sum(probs_TE.new_zeros(()))  # the other ranks wait for it
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
    sequences = rows.sum((valid_BL.sum(1) > 0).sum().to(probs_TE.dtype)) / rows.size
    return per_sequence_B.sum() / sequences.clamp(min=1 / rows.size)


def z_loss(
    logits_TE: Tensor, *, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """``mean_t (log sum_e exp Z_te)^2``, which keeps the logits small. Zero when no token is valid.

    With ``group``, its ranks' losses have the mean over all their tokens as their mean: what one number per
    rank, exchanged, makes of ranks with different numbers of tokens.

    Source: arXiv 2202.08906, eq. 5 (ST-MoE; coefficient 1e-3 there).

    Examples:
        >>> import torch
        >>> round(z_loss(torch.zeros(3, 4)).item(), 4)  # log(4)^2
        1.9218
    """
    count = None
    if group is not None:
        tokens = len(logits_TE) if mask is None else mask.sum()
        rows = RowGroup(group)
        count = rows.sum(torch.as_tensor(tokens, device=logits_TE.device).to(logits_TE.dtype)) / rows.size
    return masked_mean(logits_TE.logsumexp(dim=1).square(), mask, count)


def squared_cv(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, ``var / mean^2``: 0 when all are equal, also when all are zero."""
    mean = values_E.mean()
    return (values_E - mean).square().mean() / mean.square().clamp(min=1e-20)


def slot_shares(indices_TK: Tensor, num_experts: int, *, mask: Tensor | None = None) -> Tensor:
    """(E,) float32, the share of the filled slots of valid tokens that each expert received."""
    loads_E = slot_loads(indices_TK, num_experts, mask=mask)
    return loads_E / loads_E.sum().clamp(min=1)


def slot_loads(
    indices_TK: Tensor, num_experts: int, *, mask: Tensor | None = None, rows: RowGroup = LOCAL
) -> Tensor:
    """(E,) int64, the filled slots of valid tokens on each expert, on all ranks of ``rows``."""
    if mask is not None:
        indices_TK = torch.where(mask[:, None], indices_TK, -1)
    return rows.sum(expert_loads(indices_TK, num_experts))


def shared_balance(
    indices_TK: Tensor, num_experts: int, *, mask: Tensor | None, rows: RowGroup
) -> tuple[Tensor, Tensor | None]:
    """Shares (E,) over all ranks, and the ``count`` with which the ranks' losses have that of all as mean.

    From one message of E numbers. Alone: this batch's shares and None.
    """
    if rows.is_local:
        return slot_shares(indices_TK, num_experts, mask=mask), None
    loads_E = slot_loads(indices_TK, num_experts, mask=mask, rows=rows).to(torch.float64)
    slots = loads_E.sum()
    return loads_E / slots.clamp(min=1), slots / (indices_TK.shape[1] * rows.size)


def shared_sum(values: Tensor, rows: RowGroup) -> Tensor:
    """``values`` summed over the R ranks, with R times the gradient of this rank's part.

    So the mean over the ranks, which data parallelism takes of the gradients, is the gradient of the sum.
    """
    if rows.is_local:
        return values
    return rows.sum(values) + rows.size * (values - values.detach())


def masked_mean(values: Tensor, mask: Tensor | None, count: Tensor | None = None) -> Tensor:
    """Mean over the first dimension where ``mask`` (T,) is True; zero, not NaN, when that is nowhere.

    ``count`` takes the place of the number of values that the sum is divided by.
    """
    if mask is not None:
        weights = mask.to(values.dtype)
        values = values * weights.view(-1, *[1] * (values.dim() - 1))
        count = weights.sum().clamp(min=1) if count is None else count
    if count is None:
        return values.sum(0) / max(len(values), 1)
    return values.sum(0) / torch.where(count > 0, count, 1.0).to(values.dtype)
