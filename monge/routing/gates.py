"""What methods share: scores from logits, the top-k choice, and the gates of chosen experts.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scores_of(logits_TE: Tensor, kind: str) -> Tensor:
    """(T, E) scores: the logits themselves ("logits"), their softmax over experts, or their sigmoid."""
    if kind == "logits":
        return logits_TE
    return logits_TE.softmax(dim=1) if kind == "softmax" else logits_TE.sigmoid()


def top_k_of(scores_TE: Tensor, k: int) -> Tensor:
    """(T, k) int64, the experts of the k largest scores of each token, by falling score."""
    return scores_TE.topk(k, dim=1).indices


def gates_of(
    logits_TE: Tensor, indices_TK: Tensor, *, kind: str = "softmax", renormalise: bool | None = None
) -> Tensor:
    """(T, K) gates of the chosen experts: their scores, divided by their sum if ``renormalise``.

    ``renormalise=None`` means where K > 1: the one renormalised gate of K = 1 would be constant and teach the
    router nothing. ``kind`` "logits" has no scores to divide by and counts as "softmax".
    """
    if not _renormalises(renormalise, indices_TK.shape[1]):
        return scores_of(logits_TE, "sigmoid" if kind == "sigmoid" else "softmax").gather(1, indices_TK)
    # exp(log s) / sum exp(log s): a softmax over the chosen, safe where every score underflows.
    log_scores_TE = F.logsigmoid(logits_TE) if kind == "sigmoid" else logits_TE
    return log_scores_TE.gather(1, indices_TK).softmax(dim=1)


def annealed_gates(
    logits_TE: Tensor, indices_TK: Tensor, steps: Tensor, *, start: float, duration: int
) -> Tensor:
    """(T, K) the softmax of the first choice, and that of the others times a factor that falls linearly from
    ``start`` to 1 while ``steps`` go from 0 to ``duration``; not renormalised. MaxScore's released SoftTopk.
    """
    factor = start + (1.0 - start) * (steps / duration).clamp(max=1.0)
    probs_TK = gates_of(logits_TE, indices_TK, renormalise=False)
    return torch.cat([probs_TK[:, :1], factor * probs_TK[:, 1:]], dim=1)


def normalised(values_TK: Tensor, renormalise: bool | None = None) -> Tensor:
    """``values_TK`` divided by the sum of their row, on the terms of ``gates_of``; rows of zeros stay."""
    if not _renormalises(renormalise, values_TK.shape[1]):
        return values_TK
    total_T1 = values_TK.sum(dim=1, keepdim=True)
    return values_TK / torch.where(total_T1 > 0, total_T1, 1.0)


def _renormalises(renormalise: bool | None, k: int) -> bool:
    return k > 1 if renormalise is None else renormalise
