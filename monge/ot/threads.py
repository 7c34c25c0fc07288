"""Spread independent pieces of work over torch's number of threads.

The compiled kernels release the interpreter lock, so plain threads do. The split depends on the number of
threads alone, which keeps results the same from run to run at the same thread count.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pools.clear)


def split(length: int, parts: int) -> list[tuple[int, int]]:
    """``range(length)`` cut into at most ``parts`` ranges (first, last) of nearly equal length."""
    parts = max(1, min(parts, length))
    edges = [length * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def run_all(work: Callable[[Piece], None], pieces: Sequence[Piece], *, alone: bool = False) -> None:
    """Call ``work`` on every piece, on as many threads as torch uses or, ``alone``, on this one only."""
    threads = 1 if alone else min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        for piece in pieces:
            work(piece)
        return
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="monge-ot")

    def work_share(share: int) -> None:
        for piece in pieces[share::threads]:
            work(piece)

    futures = [pool.submit(work_share, share) for share in range(1, threads)]
    try:
        work_share(0)  # the calling thread takes its share too
    finally:
        for future in futures:
            future.result()
