"""The implicit gradient's two passes over a plan, compiled for the CPU; adjoint.py says what they compute.

Shapes: T rows, E columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from monge.ot.threads import run_all, split

_LANES = 8  # partial sums of a row, so that its sum vectorises in a fixed order
_CHUNK = 512  # rows whose scaled plan one thread holds in float64 at a time
_WORTH_A_THREAD = 1 << 18

_compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
_inlined = njit(inline="always")


def totals(plan_TE: Tensor, grad_TE: Tensor, row_T2: Tensor) -> Tensor:
    """(E, E + 2): gram matrix, column sums and right side; writes each row's 1 / sum(P) and sum(W)."""
    T, E = plan_TE.shape
    plan, grad, row = plan_TE.numpy(), grad_TE.numpy(), row_T2.numpy()
    threads = torch.get_num_threads() if T * E >= _WORTH_A_THREAD else 1
    out = torch.zeros(E, E + 2, dtype=torch.float64)
    chunk = _CHUNK * (1 if threads == 1 else 4 * threads)
    half = np.empty((min(T, chunk), E))
    for start in range(0, T, chunk):
        pieces = split(min(chunk, T - start), threads)
        parts = np.zeros((len(pieces), 2, E))

        def gather(index: int, start: int = start, pieces: list = pieces, parts: np.ndarray = parts) -> None:
            first, last = pieces[index]
            rows = slice(start + first, start + last)
            _gather(plan[rows], grad[rows], row[rows], half[first:last], parts[index])

        run_all(gather, range(len(pieces)))
        half_TE = torch.from_numpy(half[: pieces[-1][1]])
        out[:, :E].addmm_(half_TE.T, half_TE)
        out[:, E:] += torch.from_numpy(parts.sum(0).T)
    return out


def scores_gradient(
    plan_TE: Tensor, grad_TE: Tensor, row_T2: Tensor, y_E: Tensor, epsilon: float, out_TE: Tensor, x_T: Tensor
) -> None:
    """Write the gradient of the scores and the rows' multipliers, from the columns' multipliers."""
    T, E = plan_TE.shape
    plan, grad, row, y = plan_TE.numpy(), grad_TE.numpy(), row_T2.numpy(), y_E.contiguous().numpy()
    out, x = out_TE.numpy(), x_T.numpy()
    threads = torch.get_num_threads() if T * E >= _WORTH_A_THREAD else 1

    def scatter(piece: tuple[int, int]) -> None:
        rows = slice(*piece)
        _scatter(plan[rows], grad[rows], row[rows], y, 1.0 / epsilon, x[rows], out[rows])

    run_all(scatter, split(T, threads))


@_compiled
def _gather(plan_TE, grad_TE, row_T2, half_TE, sums_2E):
    T, E = plan_TE.shape
    lanes = np.empty((2, _LANES))
    for t in range(T):
        lanes[:] = 0.0
        for start in range(0, E - E % _LANES, _LANES):
            for l in range(_LANES):
                p = np.float64(plan_TE[t, start + l])
                lanes[0, l] += p
                lanes[1, l] += p * grad_TE[t, start + l]
        for e in range(E - E % _LANES, E):
            p = np.float64(plan_TE[t, e])
            lanes[0, 0] += p
            lanes[1, 0] += p * grad_TE[t, e]
        total, weighted = _sum(lanes[0]), _sum(lanes[1])
        inverse = 1.0 / total if total > 0 else 0.0
        row_T2[t, 0] = inverse
        row_T2[t, 1] = weighted
        mean = weighted * inverse
        root = np.sqrt(inverse)
        for e in range(E):
            p = np.float64(plan_TE[t, e])
            half_TE[t, e] = p * root
            sums_2E[0, e] += p
            sums_2E[1, e] += p * (grad_TE[t, e] - mean)


@_compiled
def _scatter(plan_TE, grad_TE, row_T2, y_E, inverse_epsilon, x_T, out_TE):
    T, E = plan_TE.shape
    lanes = np.empty(_LANES)
    for t in range(T):
        lanes[:] = 0.0
        for start in range(0, E - E % _LANES, _LANES):
            for l in range(_LANES):
                lanes[l] += plan_TE[t, start + l] * y_E[start + l]
        for e in range(E - E % _LANES, E):
            lanes[0] += plan_TE[t, e] * y_E[e]
        x = row_T2[t, 0] * (row_T2[t, 1] - _sum(lanes))
        x_T[t] = x
        for e in range(E):
            out_TE[t, e] = plan_TE[t, e] * (grad_TE[t, e] - x - y_E[e]) * inverse_epsilon


@_inlined
def _sum(lanes):
    total = 0.0
    for l in range(_LANES):
        total += lanes[l]
    return total
