"""Completion: every row gets its k distinct columns under the capacity, whatever is missing.

Why it succeeds. Let row t lack a slot, and let F be the columns with room; there is one, for fewer than T k
of the at least T k places are taken. If t may take a column of F that it does not have, it does. Otherwise
search backwards from F: column e reaches f when some row has e, lacks f and may take f, since that row can
move from e to f and leave a place on e. The first reached column that t lacks and may take ends the search:
the rows along the path move, t takes the place, and no load grows but that of the path's end, which had
room. This is an augmenting path of a flow, so that where none exists there is no complete assignment (Ford
and Fulkerson, 1956).

Without forbidden pairs a single move suffices. t holds all of F and lacks some e, which is therefore full;
take f in F. More rows have e than have f, and t has f without e, so that another row has e without f: it
moves.

Of the paths with the fewest moves the one that loses least is taken. A search costs O(T k) per column
reached.

Shapes: B instances, T rows, E columns, k choices per row.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(cache=True, nogil=True)
def complete(scores_TE, slots_Tk, loads_E, capacity):  # type: ignore[no-untyped-def]
    """Fill the empty slots (-1) of ``slots_Tk`` in place and count them in ``loads_E``; False if impossible.

    Scores are float64, so that there is one kernel to compile.
    """
    T, E = scores_TE.shape
    k = slots_Tk.shape[1]
    # loss[e]: least score lost by freeing one place on e; its row mover[e] goes from there to onward[e].
    loss, level = np.empty(E), np.empty(E, np.int64)
    mover, onward = np.empty(E, np.int64), np.empty(E, np.int64)
    has = np.zeros(E, np.bool_)
    for t in range(T):
        for slot in range(k):
            if slots_Tk[t, slot] >= 0:
                continue
            has[:] = False
            for j in range(k):
                if slots_Tk[t, j] >= 0:
                    has[slots_Tk[t, j]] = True
            reached = 0
            for e in range(E):
                level[e] = 0 if loads_E[e] < capacity else -1
                loss[e] = 0.0
                reached += level[e] == 0
            depth = 0
            best = -1
            while True:
                for e in range(E):
                    if level[e] != depth or has[e] or scores_TE[t, e] == -np.inf:
                        continue
                    if best < 0 or scores_TE[t, e] - loss[e] > scores_TE[t, best] - loss[best]:
                        best = e
                if best >= 0 or reached == 0:
                    break
                reached = _widen(scores_TE, slots_Tk, loss, level, mover, onward, depth)
                depth += 1
            if best < 0:
                return False
            e = best
            while level[e] > 0:
                row, f = mover[e], onward[e]
                for j in range(k):
                    if slots_Tk[row, j] == e:
                        slots_Tk[row, j] = f
                e = f
            loads_E[e] += 1
            slots_Tk[t, slot] = best
    return True


@numba.njit(nogil=True)
def _widen(scores_TE, slots_Tk, loss, level, mover, onward, depth):  # type: ignore[no-untyped-def]
    """Reach every unreached column from which one move leads to a column of level ``depth``; count them."""
    T, k = slots_Tk.shape
    frontier = np.flatnonzero(level == depth)
    reached = 0
    for row in range(T):
        for f in frontier:
            if scores_TE[row, f] == -np.inf:
                continue
            held = False
            for j in range(k):
                held |= slots_Tk[row, j] == f
            if held:
                continue
            for j in range(k):
                e = slots_Tk[row, j]
                if e < 0 or 0 <= level[e] <= depth:
                    continue
                lost = scores_TE[row, e] - scores_TE[row, f] + loss[f]
                if level[e] < 0 or lost < loss[e]:
                    reached += level[e] < 0
                    level[e] = depth + 1
                    loss[e], mover[e], onward[e] = lost, row, f
    return reached


@torch.library.custom_op("monge::complete_assignment", mutates_args=())
def complete_assignment(
    scores_BTE: Tensor, slots_BTk: Tensor, mask_BT: Tensor, capacity_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Complete each instance; returns the slots and (B,) bool, whether a complete assignment exists.

    Capacities are (B,), or (B, E) where columns differ. On an accelerator one flag is read (is anything
    missing?), and only if it is set does the work go to the CPU.
    """
    slots_BTk = slots_BTk.clone()
    complete_B = ~((slots_BTk < 0).any(-1) & mask_BT).any(-1)
    if bool(complete_B.all()):
        return slots_BTk, complete_B
    for i in torch.nonzero(~complete_B).flatten().tolist():
        valid = mask_BT[i]
        slots = slots_BTk[i][valid].cpu().contiguous()
        scores = scores_BTE[i][valid].cpu().to(torch.float64).contiguous()
        loads = np.bincount(slots[slots >= 0].numpy(), minlength=scores.shape[1])
        above = loads.astype(np.int64) - capacity_B[i].cpu().numpy()  # so that every column may rise to 0
        complete_B[i] = complete(scores.numpy(), slots.numpy(), above, 0)
        slots_BTk[i, valid] = slots.to(slots_BTk.device)
    return slots_BTk, complete_B


@complete_assignment.register_fake
def _(scores_BTE: Tensor, slots_BTk: Tensor, mask_BT: Tensor, capacity_B: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slots_BTk), scores_BTE.new_empty(scores_BTE.shape[0], dtype=torch.bool)
