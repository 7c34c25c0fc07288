"""``assign``: checks, batches, masks and capacities around the three assignment methods.

Shapes: T rows, E columns, k choices per row, B instances (all leading dimensions flattened), C capacity.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from monge.ot.assignment.approximate import solve_approximate
from monge.ot.assignment.certificate import certified
from monge.ot.assignment.host import bad_values_message, capacity_of, operator, solve_on_cpu
from monge.ot.assignment.shared import solve_shared
from monge.ot.assignment.solution import REASON_CODES, STAGES, Assignment
from monge.ot.distributed import RowGroup

METHODS = ("exact", "approximate", "greedy")


def assign(
    scores: Tensor,
    k: int,
    *,
    capacity: int | None = None,
    capacity_factor: float = 1.0,
    mask: Tensor | None = None,
    method: str = "exact",
    max_work: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Assignment:
    """Give each row k distinct columns, each column at most ``capacity`` rows, for the largest sum of scores.

    ``max sum_te x_te s_te  subject to  sum_e x_te = k,  sum_t x_te <= capacity,  x_te in {0, 1}``

    No column exceeds its capacity and no row is dropped. The prices b of the dual make the answer checkable,
    and the top-k of ``scores - b`` of a row is its assignment up to ties. Gradients do not flow through an
    assignment: scores are detached.

    Which method to choose: ``"exact"``, unless the scores are on an accelerator and waiting for the CPU costs
    more than the last 0.01 % of the objective: then ``"approximate"``. ``"greedy"`` is there to compare with.

    - ``"exact"``: a CPU kernel. Scores on an accelerator are copied to the CPU and back, which synchronises.
    - ``"approximate"``: a fixed number of vectorised steps on the device of the scores. Only whether anything
      is left to complete is read back. The gap, certified, is some 1e-5 on ordinary scores.
    - ``"greedy"``: best pairs first, then completed. On the CPU, like ``"exact"``.

    Args:
        scores: (..., T, E), any float dtype (below float32: computed in float32). -inf forbids a pair. Each
            leading index is a problem of its own; problems are solved in parallel on
            ``torch.get_num_threads()`` threads.
        k: columns per row, 1 <= k <= E.
        capacity: rows per column; None: ``ceil(capacity_factor * T_valid * k / E)``, T_valid the unmasked
            rows of the problem.
        capacity_factor: used when ``capacity`` is None; 1 balances perfectly. Read as the decimal it prints
            as, so that 1.1 * 10 is 11.
        mask: (..., T) bool, True marks valid rows. The others get -1 and take no capacity; their scores are
            ignored, whatever they hold.
        method: ``"exact"``, ``"approximate"`` or ``"greedy"``.
        max_work: bound on the work of the exact repair, in its own deterministic units (``Assignment.work``);
            where it is reached the status is ``"approximate"`` and the gap tells what may be missing. None:
            the solver's own bound.
        group: a process group over whose ranks the rows are spread, any number to each, for
            ``method="approximate"`` alone; capacities then hold for all rows together. ``indices`` are those
            of this rank's rows, all other fields those of the whole problem. Scores must be finite. Messages
            have at most 15 E numbers; each rank hears E + 1 of every other once, and waits for the device
            there. All ranks must call together.

    Returns:
        ``Assignment``. A problem without an answer (too little capacity, too many forbidden pairs) is
        reported as status ``"infeasible"`` with a reason, not raised.

    Raises:
        TypeError: ``scores`` or ``mask`` is not a tensor.
        ValueError: a bad argument; NaN or +inf in a valid row. With ``"approximate"`` on an accelerator or
            under ``torch.compile``, where looking at values would synchronise, such a problem is reported as
            infeasible.

    Source: the minimum-cost flow of MaxScore, arXiv 2508.12801, section 3.

    Examples:
        >>> import torch
        >>> from monge.ot import assign
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6], [0.1, 0.3]])
        >>> answer = assign(scores, k=1)
        >>> answer.indices.flatten().tolist(), answer.loads.tolist(), answer.status
        ([0, 0, 1, 1], [2, 2], 'optimal')
        >>> round(float(answer.objective), 4), float(answer.gap) < 1e-6
        (2.6, True)
    """
    _check(scores, k, capacity, mask, method, max_work)
    if group is not None and method != "approximate":
        raise ValueError(f"method={method!r} does not go through a process group: use method='approximate'")
    factor = _exact_factor(capacity_factor)
    scores = scores.detach()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    if method == "approximate":
        return _approximate(scores, mask, k, capacity, factor, RowGroup(group))
    traced = torch.compiler.is_compiling() or scores.is_meta or type(scores) is not Tensor
    solve = operator if traced else solve_on_cpu
    return Assignment(*solve(scores, mask, k, capacity, *factor, max_work, method))


def capacities(valid_B: Tensor, E: int, k: int, capacity: int | None, factor: tuple[int, int]) -> Tensor:
    """(B,) ``capacity_of`` the valid rows of every problem, without reading their number off the device."""
    if capacity is not None:
        return valid_B.clamp(max=capacity)
    numerator, denominator = factor
    return torch.minimum(valid_B, -(-valid_B * (k * numerator) // (E * denominator)))


def _approximate(
    scores: Tensor,
    mask: Tensor | None,
    k: int,
    capacity: int | None,
    factor: tuple[int, int],
    rows: RowGroup,
) -> Assignment:
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(scores, mask, rows)
    masked = mask is not None
    if mask is None:
        mask = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    batch, (T, E) = scores.shape[:-2], scores.shape[-2:]
    B = math.prod(batch)
    scores_BTE, mask_BT = scores.reshape(B, T, E), mask.reshape(B, T)
    valid_B = rows.sum(mask_BT.sum(-1))
    capacity_B = capacities(valid_B, E, k, capacity, factor)
    if rows.is_local:
        most = capacity_of(T, E, k, capacity, factor)
        slack = masked or E * most > T * k
        slots_BTk, prices_BE, complete_B = solve_approximate(scores_BTE, mask_BT, k, capacity_B, most, slack)
    else:
        slots_BTk, prices_BE, complete_B = solve_shared(scores_BTE, mask_BT, k, capacity_B, valid_B, rows)
    indices_BTk, objective_B, bound_B, optimal_B = certified(
        scores_BTE, mask_BT, slots_BTk, prices_BE, capacity_B, rows
    )

    reason_B = torch.where(optimal_B, REASON_CODES[""], REASON_CODES["steps"])
    reason_B = torch.where(complete_B, reason_B, REASON_CODES["pairs"])
    short_BT = (scores_BTE > -torch.inf).sum(-1) < k
    reason_B = torch.where((short_BT & mask_BT).any(-1), REASON_CODES["row"], reason_B)
    reason_B = torch.where(E * capacity_B < k * valid_B, REASON_CODES["slots"], reason_B)
    bad_BT = (scores_BTE.isnan() | (scores_BTE == torch.inf)).any(-1)
    reason_B = torch.where((bad_BT & mask_BT).any(-1), REASON_CODES["values"], reason_B)
    solved_B = reason_B <= REASON_CODES["steps"]
    status_B = torch.where(solved_B, torch.where(optimal_B, 0, 1), 2)
    stage_B = torch.full_like(status_B, STAGES.index("approximate"))
    indices_BTk = torch.where(solved_B[:, None, None], indices_BTk, -1)
    flat_BN = indices_BTk.flatten(1) + 1  # bin 0 takes the -1 of masked rows
    bins_BE = flat_BN.new_zeros(len(flat_BN), E + 1).scatter_add(-1, flat_BN, torch.ones_like(flat_BN))
    answer = (
        indices_BTk,
        torch.where(solved_B[:, None], prices_BE, 0.0),
        rows.sum(bins_BE[:, 1:]),
        torch.where(solved_B, objective_B, -torch.inf),
        torch.where(solved_B, bound_B, -torch.inf),
        torch.stack((status_B, stage_B, reason_B, torch.zeros_like(status_B), capacity_B), -1),
    )
    return Assignment(*(x.reshape(batch + x.shape[1:]) for x in answer))


def _check_values(scores: Tensor, mask: Tensor | None, rows: RowGroup) -> None:
    """Raise ValueError for scores that no rank may have; all ranks raise, so that none waits for another."""
    message = bad_values_message(scores, mask)
    if rows.is_local:
        if message:
            raise ValueError(message)
        return
    forbidden = scores == -torch.inf
    forbidden = forbidden.any() if mask is None else (forbidden & mask.unsqueeze(-1)).any()
    bad, pairs = rows.max(torch.tensor([bool(message), bool(forbidden)]).double()).bool().tolist()
    if bad:
        raise ValueError(
            message or "scores of valid rows are NaN or +inf on another rank; clean or mask them"
        )
    if pairs:
        raise ValueError(
            "scores of valid rows must be finite with a process group, and some are -inf: give forbidden "
            "pairs a very low score instead"
        )


def _check(
    scores: Tensor, k: int, capacity: int | None, mask: Tensor | None, method: str, max_work: int | None
) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"scores must be a torch.Tensor, got {type(scores).__name__}: use torch.as_tensor(scores)"
        )
    if scores.ndim < 2 or not scores.is_floating_point():
        raise ValueError(
            "scores must be a floating-point tensor of shape (..., T, E), "
            f"got {scores.dtype} {tuple(scores.shape)}"
        )
    E = scores.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= E:
        raise ValueError(f"k must be an integer in 1..E = {E}, got {k!r}")
    if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
        raise ValueError(f"capacity must be None or an integer of at least 1, got {capacity!r}")
    if max_work is not None and (not isinstance(max_work, int) or max_work < 0):
        raise ValueError(f"max_work must be None or a non-negative integer, got {max_work!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor of bool, got {type(mask).__name__}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != scores.shape[:-1]):
        raise ValueError(
            f"mask must be bool of shape {tuple(scores.shape[:-1])}, one entry per row of scores, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )


def _exact_factor(factor: float) -> tuple[int, int]:
    """The decimal that was written, not its binary neighbour: 1.1 * 10 must not round up to 12."""
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"capacity_factor must be a positive finite number, got {factor!r}")
    if float(factor).is_integer():
        return int(factor), 1
    # The denominator is bounded to keep the products of ``capacities`` inside int64.
    return Fraction(repr(float(factor))).limit_denominator(10**6).as_integer_ratio()
