"""The four-term loss of DOT-MoE.

Shapes: B sequences, L tokens of a sequence, V vocabulary, T = B L tokens, N routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from monge.conversion.alignment.config import AlignmentConfig
from monge.ot.distributed import LOCAL, RowGroup
from monge.routing.losses import load_balance_loss, shared_balance, z_loss


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one step, each a scalar with its gradient; ``kl`` and ``ce`` in nats per token."""

    kl: Tensor
    ce: Tensor
    z: Tensor
    balance: Tensor

    def total(self, config: AlignmentConfig) -> Tensor:
        """``c_kl KL(dense || sparse) + c_ce CE + c_z z-loss + c_balance load balance`` (arXiv 2606.01666)."""
        return config.kl * self.kl + config.ce * self.ce + config.z * self.z + config.balance * self.balance


def distance(sparse_BLV: Tensor, dense_BLV: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(dense || sparse)`` over all positions and the cross-entropy of the next token, nats per token."""
    sparse_TV = _wide(sparse_BLV.flatten(0, 1)).log_softmax(dim=-1)
    dense_TV = _wide(dense_BLV.flatten(0, 1)).log_softmax(dim=-1)
    kl = nnf.kl_div(sparse_TV, dense_TV, reduction="batchmean", log_target=True)
    before_BLV = sparse_TV.view(sparse_BLV.shape)[:, :-1]
    return kl, nnf.nll_loss(before_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten())


def router_losses(routed: Sequence[tuple[Tensor, int]], rows: RowGroup = LOCAL) -> tuple[Tensor, Tensor]:
    """z-loss and load-balance loss, each the mean over layers, from every layer's logits (T, N) and k.

    The mean over the ranks of ``rows`` is the loss of all their tokens.
    """
    z, balance = [], []
    for logits_TN, k in routed:
        chosen_TK = logits_TN.detach().topk(k, dim=1).indices
        shares_N, count = shared_balance(chosen_TK, logits_TN.shape[1], mask=None, rows=rows)
        logits_TN = _wide(logits_TN)
        z.append(z_loss(logits_TN, group=rows.group))
        balance.append(load_balance_loss(logits_TN.softmax(dim=1), shares_N, count=count))
    if not z:
        return torch.zeros(()), torch.zeros(())
    return torch.stack(z).mean(), torch.stack(balance).mean()


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
