"""Large CPU buffers in huge pages.

The system hands out new memory a page at a time, and zeroes each at its first use: with pages of 4 KiB a
gradient of 400 MiB costs as much as several matrix products. numpy asks for pages of 2 MiB where it allocates
4 MiB or more (``madvise``, on Linux), which makes that four to five times cheaper; torch does not unless the
environment says ``THP_MEM_ALLOC_ENABLE=1``. So large buffers are numpy's, seen as tensors.

The gradients of all experts are so large, and needed anew in every step, that even huge pages cost as much as
some of the products. Their memory is kept for the next step (`gradient`), as is that of a buffer which every
layer needs (`scratch`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from threading import RLock

import numpy as np
import torch
from torch import Tensor

from monge.moe.cpu_kernels import LINE

LARGE = 4 * 2**20  # bytes from which numpy asks for huge pages


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``, in huge pages if it is large and on the CPU.

    For memory that is used once: what this returns never comes from a cache, so small buffers are torch's.
    """
    dtype = dtype or like.dtype
    if not (size := _large_size(like, shape, dtype)):
        return like.new_empty(shape, dtype=dtype)
    return _seen(_allocate(size), shape, dtype)


def gradient(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """``weight.new_empty(shape)``, a large one in the memory of an earlier gradient that nobody holds now.

    There are never more of them than were in use at one time. They are given back when the last weight dies
    that asked for one of their size.
    """
    if not (size := _large_size(weight, shape, weight.dtype)):
        return weight.new_empty(shape)
    return _kept.take(size, weight, shape, weight.dtype)


def scratch(weight: Tensor, size: int) -> Tensor:
    """(size,) uint8 on the CPU, in the memory of an earlier one that nobody holds now, kept like gradients.

    For one size, or a few: each of them stays.
    """
    if not _large_size(weight, (size,), torch.uint8):
        return torch.empty(size, dtype=torch.uint8)
    return _kept.take(size, weight, (size,), torch.uint8)


class Kept:
    """Memory by its size in bytes, as long as weights live for which that much was taken.

    A tensor gets a view of an array, and holds that view: the array is free once the view is gone.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # of one thread even if collecting garbage calls `_forget` within `take`
        self._arrays: dict[int, list[tuple[np.ndarray, weakref.ref[np.ndarray]]]] = {}  # each with its view
        self._weights: dict[int, set[int]] = {}  # their ids

    def take(self, size: int, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An array that no tensor looks at, or a new one, as a tensor."""
        with self._lock:
            weights, arrays = self._weights.setdefault(size, set()), self._arrays.setdefault(size, [])
            if id(weight) not in weights:
                weights.add(id(weight))
                weakref.finalize(weight, self._forget, size, id(weight)).atexit = False
            free = next((i for i, (_, view) in enumerate(arrays) if view() is None), len(arrays))
            memory = arrays[free][0] if free < len(arrays) else _allocate(size)
            view = memory.view()
            arrays[free : free + 1] = [(memory, weakref.ref(view))]
            return _seen(view, shape, dtype)

    def _forget(self, size: int, weight: int) -> None:
        with self._lock:
            self._weights[size].discard(weight)
            if not self._weights[size]:
                del self._weights[size], self._arrays[size]


_kept = Kept()


def _large_size(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes, or 0 where torch should allocate: small, on an accelerator, or to be filled with NaN."""
    size = math.prod(shape) * dtype.itemsize
    small = size < LARGE or like.device.type != "cpu"
    return 0 if small or torch.are_deterministic_algorithms_enabled() else size


def _allocate(size: int) -> np.ndarray:
    """(size,) uint8, from the beginning of a line of the cache: numpy's begin 16 bytes further on."""
    memory = np.empty(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size]


def _seen(memory: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The array as a tensor, which holds it."""
    return torch.from_numpy(memory).view(dtype).view(*shape)
