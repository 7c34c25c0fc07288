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
from monge.routing.losses import load_balance_loss, slot_shares, z_loss


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
    sparse_TV = sparse_BLV.flatten(0, 1).float().log_softmax(dim=-1)
    dense_TV = dense_BLV.flatten(0, 1).float().log_softmax(dim=-1)
    kl = nnf.kl_div(sparse_TV, dense_TV, reduction="batchmean", log_target=True)
    before_BLV = sparse_TV.view(sparse_BLV.shape)[:, :-1]
    return kl, nnf.nll_loss(before_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten())


def router_losses(routed: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """z-loss and load-balance loss, each the mean over layers, from every layer's logits (T, N) and k."""
    z, balance = [], []
    for logits_TN, k in routed:
        chosen_TK = logits_TN.detach().topk(k, dim=1).indices
        shares_N = slot_shares(chosen_TK, logits_TN.shape[1])
        z.append(z_loss(logits_TN.float()))
        balance.append(load_balance_loss(logits_TN.float().softmax(dim=1), shares_N))
    if not z:
        return torch.zeros(()), torch.zeros(())
    return torch.stack(z).mean(), torch.stack(balance).mean()
