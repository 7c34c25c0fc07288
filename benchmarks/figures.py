"""The files of the benchmarks: their rows, and the machine that they were taken on."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path

import torch

from monge.workspace.machine import accelerator


def machine(device: str = "cpu") -> dict[str, object]:
    """What the figures were taken on: processor, cores, load, accelerator, versions and the date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = models[0] if models else cpu
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **accelerator(device),
    }


def write_json(path: str | Path, rows: list[dict[str, object]], device: str = "cpu") -> None:
    """Write ``{"machine": ..., "rows": rows}`` to ``path``, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")
