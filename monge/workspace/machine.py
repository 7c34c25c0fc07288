"""What a result depends on beside its settings: the versions of the libraries, the processor, the threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("monge", "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba")


def versions() -> dict[str, str]:
    """Of Python and the libraries, as `config.json` stores them."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, the cores this process may use, the threads it does use, and the accelerator."""
    cpu = {"cpu": _cpu(), "cores": usable_cores(), "threads": torch.get_num_threads()}
    return cpu | accelerator(device)


def accelerator(device: str) -> dict[str, str]:
    """The name of the accelerator that computes; nothing of the CPU."""
    if torch.device(device).type == "cpu":
        return {}
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: device)
    return {"accelerator": name(device)}


def usable_cores() -> int:
    """Cores that this process may use: in a container or a batch system perhaps not all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch does not know it, or cannot use it here.

    Examples:
        >>> from monge.workspace.machine import usable_device
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}). Try device cpu.") from error
    return torch.device(name)


@contextmanager
def torch_threads(wanted: int) -> Iterator[None]:
    """torch computes with so many threads meanwhile, but no more than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(wanted, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"


def _cpu() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
