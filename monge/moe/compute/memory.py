"""Large CPU buffers in huge pages.

The system hands out new memory a page at a time, and zeroes each at its first use: with pages of 4 KiB a
gradient of 400 MiB costs as much as several matrix products. numpy asks for pages of 2 MiB where it allocates
4 MiB or more (``madvise``, on Linux), which makes that four to five times cheaper; torch does not unless the
environment says ``THP_MEM_ALLOC_ENABLE=1``. So large buffers are numpy's, seen as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE = 4 * 2**20  # bytes from which numpy asks for huge pages


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``, in huge pages if it is large and on the CPU.

    For memory that is used once: what this returns never comes from a cache, so small buffers are torch's.
    """
    dtype = dtype or like.dtype
    items = int(np.prod(shape, dtype=np.int64))
    # deterministic mode may want NaN in new memory: that is torch's to do
    fills = torch.are_deterministic_algorithms_enabled()
    if like.device.type != "cpu" or items * dtype.itemsize < LARGE or fills:
        return like.new_empty(shape, dtype=dtype)
    memory = np.empty(items * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(*shape)
