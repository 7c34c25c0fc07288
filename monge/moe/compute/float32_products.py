"""Float32 matrix products by oneDNN, where it is as exact as the default and faster.

On processors other than Intel's, torch's default library (MKL) leaves up to half of the speed of float32
products unused, oneDNN less (AMD EPYC with AVX-512, one core: 80 against 170 GFLOP/s on one machine, 45 to 84
against 70 to 97 on another). torch takes oneDNN for float32 if it may round the factors to bfloat16, which
oneDNN does only on a processor with units for that (AMX). So the permission is given, and kept only if a
product shows that nothing was rounded.

oneDNN prepares a kernel for every new shape, which takes as long as a small product: use this where shapes
come again, as in training, not where every batch brings new ones, as in prefill.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

SIZE = 256  # of the product that is tried
EXACT = 1e-5  # relative error that float32 stays below; bfloat16 is at 1e-3 and above
_lock = threading.Lock()
_inside: list[str] = []  # the setting to return to, once for everyone within


@contextmanager
def fast_float32() -> Iterator[None]:
    """Within the context float32 products on the CPU are oneDNN's, if they are exact there.

    The setting is the process's: it holds until the last thread has left the context.
    """
    settings = _settings()
    if settings is None or not _exact():
        yield
        return
    with _lock:
        _inside.append(settings.fp32_precision if not _inside else _inside[0])
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                settings.fp32_precision = before


def _settings() -> Any:
    """Where torch keeps the permission, or None if this torch has none."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") else None


@cache
def _exact() -> bool:
    """Whether products stay exact to float32 with the permission given."""
    settings = _settings()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, SIZE, SIZE), generator=generator)
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        error = (a @ b).double() - a.double() @ b.double()
    finally:
        settings.fp32_precision = before
    return error.norm().item() <= EXACT * SIZE**1.5
