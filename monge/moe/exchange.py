"""Tokens to the ranks that hold their experts, and the results back: all-to-all exchanges of rows.

A rank sorts its slots by expert, tells every rank how many rows each of its experts will get (E numbers), and
sends the rows. Whoever holds the expert runs one of the local compute paths on what arrived. The rows come
back in the order in which they left, and are summed at home with the gates. Loads may be as uneven as they
like; a rank may have no token, no row to compute or no expert at all, but has to take part.

The result is that of `monge.moe.Experts` with all experts on one rank, up to the rounding of sums in the
gradients. The splits of an exchange must be known to the host: one synchronisation per forward.

Shapes: T tokens, K slots per token, E experts, H model width, N rows sent, M rows received, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from monge.moe.compute import PATHS, choose_path
from monge.moe.compute.operator import sum_dtype
from monge.moe.dispatch import combine, sort_slots


@dataclass(frozen=True)
class Exchange:
    """Which ranks share the experts, and how many each holds, in their order.

    Attributes:
        group: the ranks.
        held: experts of each rank; rank 0 holds the first ones.
    """

    group: dist.ProcessGroup
    held: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self  # a copy of a layer exchanges with the same ranks

    def experts(
        self,
        hidden_TH: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        proj_in_EJH: Tensor,
        proj_out_EHI: Tensor,
        activation: str,
        bias_EJ: Tensor | None,
        compute: str,
    ) -> Tensor:
        """(T, H), as a compute path; the projections hold the experts of this rank alone.

        ``compute`` is a path or "auto". The gradients of the projections are those of the mean of the ranks'
        losses, as data parallelism makes those of all other weights.
        """
        share = 1.0 / len(self.held)
        proj_in_EJH, proj_out_EHI = _Scaled.apply(proj_in_EJH, share), _Scaled.apply(proj_out_EHI, share)
        bias_EJ = None if bias_EJ is None else _Scaled.apply(bias_EJ, share)
        slots = sort_slots(indices_TK, sum(self.held))
        sent, received, expert_M1 = self._announce(slots.counts_E)
        rows_NH = _Spread.apply(hidden_TH, slots.tokens_R, slots.rows_TK)
        rows_MH = _Swap.apply(rows_NH, sent, received, self.group)
        M, H = rows_MH.shape
        if not M:
            compute = "loop"  # which runs nothing; kernels want at least a row
        elif compute == "auto":
            compute = choose_path((M, 1), proj_out_EHI.shape, rows_MH.dtype, rows_MH.device)
        dtype = sum_dtype(hidden_TH, weights_TK)
        ones_M1 = torch.ones_like(expert_M1, dtype=dtype)
        out_MH = PATHS[compute](rows_MH, expert_M1, ones_M1, proj_in_EJH, proj_out_EHI, activation, bias_EJ)
        out_NH = _Swap.apply(out_MH, received, sent, self.group)
        padded_XH = torch.cat([out_NH, out_NH.new_zeros(1, H)]).to(dtype)  # an empty slot reads the zeros
        out_TKH = padded_XH.index_select(0, slots.rows_TK.flatten()).view(*indices_TK.shape, H)
        return (out_TKH * weights_TK.unsqueeze(-1)).sum(1).to(hidden_TH.dtype)

    def _announce(self, counts_E: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Rows to and from each rank, and the expert (M, 1) of every row to come, of those held here.

        Waits for the device: the host must know the sizes.
        """
        ranks, mine = len(self.held), self.held[dist.get_rank(self.group)]
        told_X = counts_E.new_empty(ranks * mine)
        dist.all_to_all_single(told_X, counts_E, [mine] * ranks, list(self.held), group=self.group)
        sent = [int(part_E.sum()) for part_E in counts_E.cpu().split(list(self.held))]
        received = told_X.view(ranks, mine).sum(1).tolist()
        experts_X = torch.arange(mine, device=counts_E.device).repeat(ranks)
        return sent, received, experts_X.repeat_interleave(told_X)[:, None]


def local_part(weight: Any) -> Tensor:
    """What this rank holds of a DTensor."""
    return weight.to_local()


class _Spread(torch.autograd.Function):
    """(N, H) rows of the tokens by expert; backward sums a token's rows in the order of its slots."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, tokens_N: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return hidden_TH.index_select(0, tokens_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        wide = torch.promote_types(grad_NH.dtype, torch.float32)
        padded_XH = torch.cat([grad_NH, grad_NH.new_zeros(1, grad_NH.shape[1])]).to(wide)
        return combine(padded_XH, rows_TK).to(grad_NH.dtype), None, None


class _Swap(torch.autograd.Function):
    """``sent[r]`` rows to rank r, ``received[r]`` rows from it; backward sends the gradients the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_NH: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _swap(rows_NH, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap(grad_MH, ctx.received, ctx.sent, ctx.group), None, None, None


def _swap(rows_NH: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out_MH = rows_NH.new_empty(sum(received), rows_NH.shape[1])
    dist.all_to_all_single(out_MH, rows_NH.contiguous(), received, sent, group=group)
    return out_MH


class _Scaled(torch.autograd.Function):
    """The tensor itself, with ``factor`` times its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None
