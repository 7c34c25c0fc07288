"""What a solver must know of a problem before it starts, and what makes a problem unsolvable.

All of it is agreed on among the ranks, errors included, so that no rank waits for one that has given up.

Shapes: B problems, T rows, E columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monge.ot.distributed import RowGroup
from monge.ot.entropic import cpu_kernels as kernels
from monge.ot.entropic.iteration import largest

_REACH = 1e290  # largest |score| / epsilon: differences of these, and Newton's levels, stay finite


@dataclass(frozen=True, slots=True)
class Survey:
    """The range of the scores, column by column, over rows that have mass.

    Attributes:
        top_BE: largest score of each column, 0 where a column has none.
        range_BE: difference of the largest and the smallest finite score, 0 for columns without mass.
        holes: whether any score is -inf; False where nobody has looked (accelerators).
    """

    top_BE: Tensor
    range_BE: Tensor
    holes: bool

    def spread(self) -> float:
        """No row is wider than this once ``top_BE`` is taken off its scores. Waits for the device."""
        return largest(self.range_BE)


def check_masses(row_mass_BT: Tensor, col_mass_BE: Tensor, rows: RowGroup) -> None:
    """Raise ValueError for masses that are negative or not finite, or that leave the rows' mass no column."""
    masses = row_mass_BT.detach().contiguous().numpy(), col_mass_BE.detach().contiguous().numpy()
    bad_row, bad_col, loose = kernels.mass_flags(*masses)
    if not rows.is_local:
        bad_row, bad_col, loose = rows.max(torch.tensor([bad_row, bad_col, loose]).double()).bool().tolist()
    for name, bad in (("row_mass", bad_row), ("col_mass", bad_col)):
        if bad:
            raise ValueError(
                f"{name} holds negative, NaN or infinite values: masses must be finite and at least 0"
            )
    if loose:
        raise ValueError(
            "col_mass is zero in every column while rows have mass: give some column a positive mass"
        )


def scale_masses(row_mass_BT: Tensor, col_mass_BE: Tensor, rows: RowGroup) -> tuple[Tensor, Tensor]:
    """Column masses (B, E) with the rows' total, and the mean mass (B,) of the rows that have any."""
    total_B, count_B = row_mass_BT.sum(-1), (row_mass_BT > 0).sum(-1)
    if not rows.is_local:
        total_B, count_B = rows.sum(torch.stack([total_B, count_B.to(total_B.dtype)], -1)).unbind(-1)
    col_total_B = col_mass_BE.sum(-1)
    scale_B = total_B / torch.where(col_total_B > 0, col_total_B, 1.0)
    return col_mass_BE * scale_B.unsqueeze(-1), torch.where(count_B > 0, total_B / count_B, 1.0)


def survey_scores(
    scores_BTE: Tensor, row_mass_BT: Tensor, col_mass_BE: Tensor, epsilon: float, rows: RowGroup
) -> Survey:
    """The scores' ranges; on a CPU it raises ValueError for scores that allow no plan."""
    local_B = _survey_compiled if scores_BTE.device.type == "cpu" else _survey_torch
    E = scores_BTE.shape[-1]
    found_BX = rows.max(local_B(scores_BTE, row_mass_BT))
    top_BE, negated_bottom_BE, flags_B2 = found_BX.split([E, E, 2], -1)
    holes = False
    if scores_BTE.device.type == "cpu":
        bad, holes = flags_B2.any(0).tolist()
        if bad:
            raise ValueError(
                "scores hold NaN or +inf in rows that count: find where they come from, or mask the rows out"
            )
        if holes:
            _check_support(scores_BTE, row_mass_BT, top_BE, col_mass_BE, rows)
        reach = largest(found_BX)
        if reach / epsilon > _REACH:
            raise ValueError(
                f"scores up to {reach:.3g} at epsilon={epsilon} overflow: scale both by the same factor"
            )
    seen_BE = top_BE > -torch.inf
    range_BE = torch.where(seen_BE & (col_mass_BE > 0), top_BE + negated_bottom_BE, 0.0)
    return Survey(torch.where(seen_BE, top_BE, 0.0), range_BE, holes)


def _survey_compiled(scores_BTE: Tensor, row_mass_BT: Tensor) -> Tensor:
    B, _, E = scores_BTE.shape
    scores, mass = scores_BTE.detach().contiguous().numpy(), row_mass_BT.detach().contiguous().numpy()
    found_BX = torch.empty(B, 2 * E + 2, dtype=row_mass_BT.dtype)
    for b, found in enumerate(found_BX.numpy()):
        kernels.survey(scores[b], mass[b], found[:E], found[E : 2 * E], found[2 * E :])
    return found_BX


def column_tops(scores_BTE: Tensor, row_mass_BT: Tensor) -> Tensor:
    """(B, E): the largest score of each column over rows with mass, 0 where there is none; differentiable."""
    top_BE = _maxima(scores_BTE, (row_mass_BT.unsqueeze(-1) > 0) & (scores_BTE > -torch.inf))
    return torch.where(top_BE > -torch.inf, top_BE, 0.0).to(row_mass_BT.dtype)


def _survey_torch(scores_BTE: Tensor, row_mass_BT: Tensor) -> Tensor:
    live_BTE = (row_mass_BT.unsqueeze(-1) > 0) & (scores_BTE > -torch.inf)
    extremes_BX = torch.cat([_maxima(scores_BTE, live_BTE), _maxima(-scores_BTE, live_BTE)], -1)
    flags_B2 = row_mass_BT.new_zeros(scores_BTE.shape[0], 2)
    return torch.cat([extremes_BX.to(row_mass_BT.dtype), flags_B2], -1)


def _maxima(values_BTE: Tensor, live_BTE: Tensor) -> Tensor:
    B, _, E = values_BTE.shape
    none_B1E = values_BTE.new_full((B, 1, E), -torch.inf)  # there may be no rows at all
    return torch.cat([torch.where(live_BTE, values_BTE, -torch.inf), none_B1E], 1).amax(1)


def _check_support(
    scores_BTE: Tensor, row_mass_BT: Tensor, top_BE: Tensor, col_mass_BE: Tensor, rows: RowGroup
) -> None:
    usable_BTE = (scores_BTE > -torch.inf) & (col_mass_BE > 0).unsqueeze(-2)
    stranded_BT = (row_mass_BT > 0) & ~usable_BTE.any(-1)
    stranded = int(rows.sum(stranded_BT.sum()))
    if stranded:
        raise ValueError(
            f"scores leave {stranded} rows that have mass nowhere to go (-inf in every column with mass): "
            "mask these rows out or allow them a column"
        )
    starved = ((top_BE == -torch.inf) & (col_mass_BE > 0)).any(0).nonzero().flatten().tolist()
    if starved:
        raise ValueError(
            f"scores are -inf in every row for columns {starved[:8]}, which have mass: "
            "give these columns col_mass 0 or allow them a row"
        )
