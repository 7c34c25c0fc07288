"""The largest memory of a stretch of a process: resident on the CPU, allocated on an accelerator.

And freed memory given back to the system, which the C library may keep otherwise.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: str) -> bool:
    """Begin a stretch. Whether `peak_bytes` will answer for it: on the CPU, only Linux can begin anew."""
    if torch.device(device).type == "mps":
        return False  # its allocator keeps no peak
    if torch.device(device).type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        _RESET.write_text("5")  # the resident peak becomes what is resident now
    except OSError:
        return False
    return True


def peak_bytes(device: str) -> int | None:
    """The peak since `reset_peak`: of the whole process on the CPU, libraries and data included."""
    if torch.device(device).type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def give_back() -> None:
    """Return freed memory of the CPU to the system, where the C library can (glibc).

    It keeps the gaps between what is still in use for later requests. After a few dozen tensors of megabytes,
    taken and let go of, these gaps can be larger than what is in use.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
