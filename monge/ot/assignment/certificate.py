"""What an assignment is worth and what any assignment could be worth at most, in float64.

Shapes: B instances, T rows, E columns, k choices per row, C capacity.

For every b with b_e >= 0 (any sign where E C = T k, since then every column is full), each assignment x obeys

    sum x_te s_te = sum x_te (s_te - b_e) + sum_e load_e b_e <= sum_t (k largest of s_t - b) + C sum_e b_e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monge.ot.distributed import LOCAL, RowGroup


def certified(
    scores_BTE: Tensor,
    mask_BT: Tensor,
    slots_BTk: Tensor,
    prices_BE: Tensor,
    capacity_B: Tensor,
    rows: RowGroup = LOCAL,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots by falling score (-1 in masked rows), objective (B,), upper bound (B,), and (B,) whether optimal.

    Optimal: objective and bound agree to 1e-12 of the magnitudes they sum, which is the rounding of the sums.
    """
    k = slots_BTk.shape[-1]
    scores_BTE = torch.where(mask_BT.unsqueeze(-1), scores_BTE.to(torch.float64), 0.0)
    slots_BTk = slots_BTk.sort(-1).values
    chosen_BTk = scores_BTE.gather(-1, slots_BTk.clamp(min=0))
    chosen_BTk, order_BTk = chosen_BTk.sort(dim=-1, descending=True, stable=True)
    indices_BTk = slots_BTk.gather(-1, order_BTk).masked_fill(~mask_BT.unsqueeze(-1), -1)
    best_BT = (scores_BTE - prices_BE.unsqueeze(-2)).topk(k, dim=-1).values.sum(-1)
    best_B = torch.where(mask_BT, best_BT, 0.0).sum(-1)
    local_B3 = torch.stack([chosen_BTk.sum((-2, -1)), best_B, chosen_BTk.abs().sum((-2, -1))], -1)
    objective_B, best_B, size_B = rows.sum(local_B3).unbind(-1)
    bound_B = best_B + capacity_B * prices_BE.sum(-1)
    size_B = size_B + capacity_B * prices_BE.abs().sum(-1)
    optimal_B = bound_B - objective_B <= 1e-12 * size_B
    # Rounding may put the objective of an optimal assignment above its bound.
    return indices_BTk, objective_B, torch.maximum(bound_B, objective_B), optimal_B
