"""Spread independent pieces of work over torch's threads.

The compiled kernels release the interpreter lock, so plain threads do. Where torch's are OpenMP's (Linux),
the work runs on those very threads: they spin for milliseconds after every parallel operator of torch, and
would take the cores from any others. Which thread takes which piece is open, and results must not depend on
it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Piece = TypeVar("Piece")

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def split(length: int, parts: int) -> list[tuple[int, int]]:
    """``range(length)`` cut into at most ``parts`` ranges (first, last) of nearly equal length."""
    parts = max(1, min(parts, length))
    edges = [length * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def run_all(work: Callable[[Piece], None], pieces: Sequence[Piece], *, alone: bool = False) -> None:
    """Call ``work`` on every piece, on as many threads as torch uses or, ``alone``, on this one only."""
    threads = 1 if alone else min(torch.get_num_threads(), len(pieces))
    left = iter(pieces)  # whose steps are one at a time, under the interpreter lock

    def take() -> None:
        for piece in left:
            work(piece)

    on_threads(take, threads)


def on_threads(work: Callable[[], None], threads: int) -> None:
    """Call ``work`` on up to ``threads`` threads, on each once, on this one in any case; back when all are.

    Raises:
        Whatever a call raised, the first if several did.
    """
    if threads <= 1:
        work()
        return
    errors: list[BaseException] = []

    def call(_: Any = None) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    if (region := _region()) is not None:
        region(_REGION(call), None, threads, 0)
    else:
        pool = _pools.get(threads)
        if pool is None:
            pool = _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="monge-ot")
        futures = [pool.submit(call) for _ in range(threads - 1)]
        call()
        for future in futures:
            future.result()
    if errors:
        raise errors[0]


def torch_threads(device: torch.device) -> int:
    """How many of torch's own threads `on_torch_threads` can use for tensors of ``device``."""
    within_reach = device.type == "cpu" and _region() is not None
    return torch.get_num_threads() if within_reach else 1


def on_torch_threads(work: Callable[[], None], threads: int) -> None:
    """`on_threads` for ``work`` that calls torch, every operator of which runs on its calling thread alone.

    Where torch's threads are out of reach (`torch_threads` says 1), each of the others would start as many.
    Gradients are not recorded; inference mode is that of the caller.
    """
    inference = torch.is_inference_mode_enabled()

    def quietly() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work()

    on_threads(quietly, threads)


def openmp_region() -> int:
    """The address of a C function that calls its first argument with its second on torch's threads.

    It is ``GOMP_parallel(function, data, threads, 0)``, for code that needs no interpreter lock; 0 where
    torch's threads are out of reach.
    """
    return _address() if _region() is not None else 0


def _region() -> Any:
    """``GOMP_parallel``, or None where torch's threads are out of reach."""
    return None if _forked else _openmp()


@cache
def _address() -> int:
    return ctypes.cast(_openmp(), ctypes.c_void_p).value or 0


@cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded, or None."""
    if os.name != "posix" or not hasattr(os, "RTLD_NOLOAD"):
        return None
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for name in [*map(str, own), "libgomp.so.1", "libiomp5.so", "libomp.so"]:
        try:
            region = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            continue
        region.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        region.restype = None
        return region
    return None


def _after_fork() -> None:
    """Threads do not survive a fork."""
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
