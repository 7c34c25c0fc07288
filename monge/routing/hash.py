"""Hash routing (arXiv 2106.04426): a fixed random table chooses the experts, nothing is learned.

Shapes: T tokens, D model width, E experts, K slots per token, R = G * E table rows, N hash bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monge.routing.router import Batch, Choice, Router

_MIN_ROWS = 4096
_BITS = 32


class Hash(Router):
    """``experts = table[hash(token) mod R]``, gates 1 / k: the baseline that any learned router should beat.

    With ``token_ids`` the hash is of the id, as in the paper: ``router(hidden, token_ids=ids)``. Without, it
    is of the signs of 32 fixed random projections of the hidden state (locality-sensitive hashing):
    similar states share experts, and the experts of a token may change while the
    layers below learn. The table is balanced: each expert occurs equally often. Causal in training and
    evaluation.

    Table and projections come from ``seed`` and ``layer``. ``weight`` is frozen; the logits are reported but
    decide nothing.

    Source: arXiv 2106.04426. Other arguments: ``Router``.

    Examples:
        >>> import torch
        >>> from monge import make_router
        >>> router = make_router("hash", dim=4, num_experts=4, top_k=2)
        >>> ids = torch.tensor([7, 9, 7])
        >>> routing = router(torch.randn(3, 4), token_ids=ids)
        >>> torch.equal(routing.indices[0], routing.indices[2]), routing.weights[0].tolist()
        (True, [0.5, 0.5])
    """

    table: Tensor
    projection: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, **common: Any) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)
        # Every E rows share a permutation; row i of them takes its places i, i + 1, ..., i + k - 1,
        # cyclically.
        groups = -(-_MIN_ROWS // num_experts)
        order_GE = torch.rand(groups, num_experts, generator=generator).argsort(dim=1)
        places_EK = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
        table_RK = order_GE[:, places_EK].flatten(0, 1)
        device = self.weight.device
        self.register_buffer("table", table_RK.to(device))
        self.register_state("projection", torch.randn(_BITS, dim, generator=generator).to(device))

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if batch.token_ids_T is not None:
            codes_T = batch.token_ids_T.to(torch.int64)
        else:
            bits_TN = (batch.hidden_TD.to(torch.float32) @ self.projection.T) > 0
            codes_T = (bits_TN * (1 << torch.arange(_BITS, device=bits_TN.device))).sum(1)
        indices_TK = self.table[mixed(codes_T) % len(self.table)]
        return Choice(indices_TK, torch.full_like(logits_TE[:, : self.top_k], 1.0 / self.top_k))


def mixed(codes: Tensor) -> Tensor:
    """int64 codes scrambled, so that close codes go far apart: two rounds of multiply and shift, mod 2^64."""
    for factor in (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85):
        codes = codes * factor
        codes = codes ^ (codes >> 31)
    return codes
