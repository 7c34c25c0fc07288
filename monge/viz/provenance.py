"""Where a result comes from: the machine, the software, the command that gives it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from monge.viz import page


def origin(config: Mapping[str, Any]) -> list[str]:
    """Machine and software of a run, as paragraphs, from its ``config.json``."""
    machine, versions = config.get("machine", {}), config.get("versions", {})
    where = [str(machine["cpu"])] if machine.get("cpu") else []
    counts = {name: machine[f"{name}s"] for name in ("core", "thread") if f"{name}s" in machine}
    where += [f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()]
    where += [str(machine["accelerator"])] if "accelerator" in machine else []
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        page.paragraph(f"Machine: {', '.join(where)}." if where else ""),
        page.paragraph(f"Software: {software}." if software else ""),
    ]


def command_text(words: list[str], settings: Mapping[str, Any]) -> str:
    """A shell command, ``words`` on its first line and an option a line after it."""
    lines = [shlex.join(words), *filter(None, (_option(*item) for item in settings.items()))]
    return " \\\n  ".join(lines)


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if value is None or value == []:
        return ""
    values = value if isinstance(value, list) else [value]
    return shlex.join([f"--{flag}", *(str(v) for v in values)])
