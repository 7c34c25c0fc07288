"""Sinkhorn beside the speed of memory, POT, unrolled gradients, and Newton beside the plain log form.

Shapes: T rows, E columns.
"""

from __future__ import annotations

import numpy as np
import ot as pot
import torch
from numba import njit
from torch import Tensor

from monge.ot import sinkhorn
from monge.ot.entropic import cpu_kernels as kernels
from monge.ot.entropic.cpu_forms import CompiledForm
from monge.ot.entropic.iteration import Stopping
from monge.speed.timing import interleave

SIZES = [(1024, 16), (8192, 64), (18944, 148)]
BIG = (262_144, 64)  # 64 MiB of float32: more than the last cache of most machines
UNROLLED = 50


def run(repeats: int) -> list[dict]:
    """Rows with case, ours_ms, peer, peer_ms, ratio (peer / ours), note; at torch's number of threads."""
    generator = torch.Generator().manual_seed(0)
    rows = [_sweep(generator, size, repeats) for size in [*SIZES[1:], BIG]]
    for size in SIZES:
        rows += _pot(generator, size, repeats)
    for size in SIZES:
        rows += _gradient(generator, size, repeats)
    return rows + [_newton(generator, size, repeats) for size in SIZES[:2]]


def _row(case: str, peer: str, ours: float, theirs: float, note: str = "") -> dict:
    return {
        "case": case,
        "ours_ms": 1e3 * ours,
        "peer": peer,
        "peer_ms": 1e3 * theirs,
        "ratio": theirs / ours,
        "note": note,
    }


@njit(cache=True, nogil=True)
def _read(blocks):
    """Sum (N, 64) float32 in 16 lanes: nothing but loads and the additions that keep them."""
    lanes = np.zeros(16, dtype=np.float32)
    for n in range(blocks.shape[0]):
        for l in range(16):
            lanes[l] += (blocks[n, l] + blocks[n, 16 + l]) + (blocks[n, 32 + l] + blocks[n, 48 + l])
    return lanes.sum()


def _sweep(generator: torch.Generator, size: tuple[int, int], repeats: int) -> dict:
    """One kernel-form sweep beside reading the same numbers once, on one thread."""
    T, E = size
    scores = torch.rand(1, T, E, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        form = CompiledForm(scores, torch.ones(1, T).double(), 1.0, scores.amax(1).double())
        tiles, mass, log_v, sums = form.tiles_BNEL[0], form.mass_BT[0], np.zeros(E), np.empty(E)
        blocks = tiles.reshape(-1, 64)
        seconds = interleave(
            {
                "ours": lambda: kernels.column_sums(tiles, mass, log_v, 1.0, True, 0, len(tiles), sums),
                "read": lambda: _read(blocks),
            },
            repeats=5 * repeats,
        )
    finally:
        torch.set_num_threads(threads)
    megabytes = blocks.nbytes / 2**20
    place = "streams from memory" if megabytes > 48 else "may sit in a cache"
    note = f"{megabytes:.0f} MiB, {place}; {blocks.nbytes / seconds['ours'] / 1e9:.1f} GB/s"
    return _row(
        f"kernel sweep {T}x{E}, 1 thread", "reading the matrix", seconds["ours"], seconds["read"], note
    )


def _pot(generator: torch.Generator, size: tuple[int, int], repeats: int) -> list[dict]:
    """Whole solves of 20 iterations in float64, in kernel form and in log form."""
    T, E = size
    rows = []
    row, col = np.ones(T), np.full(E, T / E)
    for name, spread, epsilon, method in (
        ("kernel", 5.0, 1.0, "sinkhorn"),
        ("log", 20.0, 0.05, "sinkhorn_log"),
    ):
        scores = (torch.rand(T, E, generator=generator, dtype=torch.float64) * 2 - 1) * spread
        cost = -scores.numpy()
        seconds = interleave(
            {
                "ours": lambda s=scores, e=epsilon: sinkhorn(s, epsilon=e, tol=0.0, max_iters=20),
                "pot": lambda c=cost, e=epsilon, m=method: pot.sinkhorn(
                    row, col, c, e, method=m, numItermax=20, stopThr=0.0, warn=False
                ),
            },
            repeats=min(repeats, 5),
        )
        rows.append(_row(f"20 iterations, {name} form {T}x{E}", f"POT {method}", *seconds.values()))
    return rows


def _unrolled(scores: Tensor) -> Tensor:
    """50 plain log-domain iterations in float32, as one would write them with autograd."""
    T, E = scores.shape
    log_v = torch.zeros(E)
    for _ in range(UNROLLED):
        log_u = -torch.logsumexp(scores + log_v, -1, keepdim=True)
        log_v = np.log(T / E) - torch.logsumexp(scores + log_u, 0)
    return torch.softmax(scores + log_v, -1)


def _gradient(generator: torch.Generator, size: tuple[int, int], repeats: int) -> list[dict]:
    """Forward and backward at epsilon 1: to 1e-4, and at the unrolled number of iterations."""
    T, E = size
    scores = torch.randn(T, E, generator=generator).requires_grad_()
    weight = torch.randn(T, E, generator=generator)

    def step(plan: Tensor) -> None:
        torch.autograd.grad((plan * weight).sum(), scores)

    seconds = interleave(
        {
            "converged": lambda: step(sinkhorn(scores).plan),
            "same": lambda: step(sinkhorn(scores, tol=0.0, max_iters=UNROLLED).plan),
            "unrolled": lambda: step(_unrolled(scores)),
        },
        repeats=min(repeats, 5),
        least=2e-2,  # at 5 ms a turn of ours is one call, timed with the caches that 30 ms of the peer left
    )
    iterations = int(sinkhorn(scores).iterations)
    peer, theirs = f"{UNROLLED} iterations unrolled", seconds["unrolled"]
    case = f"implicit forward + backward {T}x{E}"
    return [
        _row(case, peer, seconds["converged"], theirs, f"ours {iterations} iterations"),
        _row(case, peer, seconds["same"], theirs, f"ours {UNROLLED} iterations"),
    ]


def _newton(generator: torch.Generator, size: tuple[int, int], repeats: int) -> dict:
    """The default at spread +-20 and epsilon 0.05 beside log-form iterations to the same 1e-4."""
    T, E = size
    scores = (torch.rand(T, E, generator=generator) * 2 - 1) * 20
    target = torch.full((1, E), T / E, dtype=torch.float64)
    stopping = Stopping(1e-4, 100_000, torch.ones(1, dtype=torch.float64))
    sweeps = []

    def plain() -> None:
        form = CompiledForm(scores[None], torch.ones(1, T).double(), 0.05)
        found = form.iterate(target.log() - scores.amax(0) / 0.05, target, stopping, give_up_until=0)
        sweeps.append(int(found.sweeps_B))
        form.into_plan(found.log_v_BE)

    seconds = interleave(
        {"ours": lambda: sinkhorn(scores, epsilon=0.05), "log": plain}, repeats=min(repeats, 5)
    )
    steps = int(sinkhorn(scores, epsilon=0.05).iterations)
    note = f"ours {steps} sweeps, log form {sweeps[-1]}"
    return _row(
        f"Newton, +-20, epsilon 0.05, {T}x{E}", "log form to 1e-4", seconds["ours"], seconds["log"], note
    )
