"""The exact assignment beside OR-tools, SciPy, the released MaxScore procedure and the matmul of the gate.

Ours is ``monge.ot.assign``, with all its checks; ``engine_ms`` is the solver inside it. The peers are timed
on what is in memory: OR-tools' graph is built before. ``ratio`` is how many times faster ours is, ``gap``
how far the peer's objective is below the optimum, as a share of it and averaged over the seeds (OR-tools'
is its rounding to integers). ``paths`` is the largest number of augmenting paths ours searched.

Shapes: T rows (tokens), E columns (experts), k choices per row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.peers_assign import flow_solver, maxscore_released, scipy_rounds
from monge.ot import assign
from monge.ot.assignment.exact import solve_exact
from monge.speed.timing import interleave

LARGE = [(8192, 64, 8), (16384, 128, 8)]
SHAPES = [(512, 16, 2), (2048, 32, 2), *LARGE]
SEEDS = 3
WIDTH = 1024  # of the hidden states that the gate multiplies


def _softmax(rng: np.random.Generator, T: int, E: int, sigma: float = 1.0) -> np.ndarray:
    z = sigma * (rng.standard_normal((T, E)) + rng.standard_normal(E))
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def _bfloat16(rng: np.random.Generator, T: int, E: int) -> np.ndarray:
    return torch.from_numpy(_softmax(rng, T, E)).bfloat16().double().numpy()


def _clusters(rng: np.random.Generator, T: int, E: int, noise: float) -> np.ndarray:
    return _softmax(rng, 16, E)[rng.integers(0, 16, T)] + noise * rng.standard_normal((T, E))


ORDINARY: dict[str, Callable[..., np.ndarray]] = {"softmax": _softmax, "bf16 softmax": _bfloat16}
DEGENERATE: dict[str, Callable[..., np.ndarray]] = {
    "peaky (sigma 4)": lambda rng, T, E: _softmax(rng, T, E, 4.0),
    "integers 0..3": lambda rng, T, E: rng.integers(0, 4, (T, E)),
    "all equal": lambda rng, T, E: np.ones((T, E)),
    "16 distinct rows": lambda rng, T, E: _softmax(rng, 16, E)[np.arange(T) % 16],
    "clusters, noise 1e-3": lambda rng, T, E: _clusters(rng, T, E, 1e-3),
    "clusters, noise 1e-6": lambda rng, T, E: _clusters(rng, T, E, 1e-6),
    "rank one": lambda rng, T, E: np.outer(rng.random(T), rng.random(E)),
    "points on a line": lambda rng, T, E: -np.abs(rng.random(T)[:, None] - rng.random(E) ** 2),
}

# A peer takes a problem (scores, k, capacity) and returns the call to be timed, which returns its objective.
Peer = Callable[[np.ndarray, int, int], Callable[[], float]]
ON_CALL: dict[str, Peer] = {
    "released MaxScore": lambda *problem: partial(maxscore_released, *problem),
    "SciPy, k rounds": lambda *problem: partial(scipy_rounds, *problem),
}


def run(repeats: int = 7) -> list[dict]:
    """One row per case and peer: case, ours_ms, engine_ms, peer, peer_ms, ratio, and the peer's gap."""
    rows = []
    for (name, make), shape, factor in itertools.product(ORDINARY.items(), LARGE, (1.0, 1.25)):
        rows.append(_beside_peer(name, make, shape, factor, "OR-tools", flow_solver, repeats))
    for (name, make), shape in itertools.product(DEGENERATE.items(), [(2048, 32, 2), (8192, 64, 8)]):
        rows.append(_beside_peer(name, make, shape, 1.0, "OR-tools", flow_solver, repeats))
    for peer, prepare in ON_CALL.items():
        rows.append(_beside_peer("softmax", _softmax, SHAPES[0], 1.0, peer, prepare, repeats))
    rows += [_beside_gate(shape, 3 * repeats) for shape in SHAPES]
    return rows


def _beside_peer(
    name: str,
    make: Callable[..., np.ndarray],
    shape: tuple[int, int, int],
    factor: float,
    peer: str,
    prepare: Peer,
    repeats: int,
) -> dict:
    """Ours and the peer on the same problems, one seed after the other."""
    T, E, k = shape
    capacity = math.ceil(factor * T * k / E)
    problems = [make(np.random.default_rng(seed), T, E).astype(np.float32) for seed in range(SEEDS)]
    tensors = [torch.from_numpy(scores) for scores in problems]
    theirs = [prepare(scores, k, capacity) for scores in problems]
    answers = [assign(scores, k, capacity=capacity) for scores in tensors]
    assert all(answer.status == "optimal" for answer in answers)
    gaps = [1 - solve() / float(answer.objective) for solve, answer in zip(theirs, answers)]
    seconds = interleave(
        {
            "ours": _in_turn([partial(assign, scores, k, capacity=capacity) for scores in tensors]),
            "engine": _in_turn([partial(solve_exact, scores, k, capacity) for scores in problems]),
            "peer": _in_turn(theirs),
        },
        repeats=repeats,
    )
    case = f"{name} {T},{E},{k} cf {factor:g}"
    return _row(case, peer, seconds, gap=sum(gaps) / SEEDS, paths=max(answer.work for answer in answers))


def _beside_gate(shape: tuple[int, int, int], repeats: int) -> dict:
    """Ours beside the matrix product that makes the scores, in float32 on as many threads."""
    T, E, k = shape
    generator = torch.Generator().manual_seed(0)
    hidden, gate = torch.randn(T, WIDTH, generator=generator), torch.randn(E, WIDTH, generator=generator)
    problems = [_softmax(np.random.default_rng(seed), T, E).astype(np.float32) for seed in range(SEEDS)]
    seconds = interleave(
        {
            "ours": _in_turn([partial(assign, torch.from_numpy(scores), k) for scores in problems]),
            "engine": _in_turn([partial(solve_exact, scores, k, -(-T * k // E)) for scores in problems]),
            "peer": partial(torch.nn.functional.linear, hidden, gate),
        },
        repeats=repeats,
    )
    return _row(f"softmax {T},{E},{k} cf 1", f"gate matmul, width {WIDTH}", seconds)


def _in_turn(calls: list) -> Callable[[], object]:
    """A call that makes the next of ``calls`` each time."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _row(case: str, peer: str, seconds: dict[str, float], **figures: float) -> dict:
    return {
        "case": case,
        "ours_ms": 1e3 * seconds["ours"],
        "engine_ms": 1e3 * seconds["engine"],
        "peer": peer,
        "peer_ms": 1e3 * seconds["peer"],
        "ratio": seconds["peer"] / seconds["ours"],
        **figures,
    }
