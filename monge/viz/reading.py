"""Reading an output folder without trusting it to be complete.

A run that was interrupted has no summary, and perhaps half a last line; both are normal here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_config(out: Path) -> Record:
    """The content of ``config.json``.

    Raises:
        FileNotFoundError: there is none in ``out``.
        ValueError: it is not a JSON object.
    """
    path = out / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{out} holds no config.json, so no run was begun there: give the folder that was its --out."
        )
    config = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object: repeat the run into an empty folder.")
    return config


def read_lines(out: Path) -> list[Record]:
    """The objects of ``records.jsonl`` that have a kind, in their order; other lines are passed over."""
    path = out / "records.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = (_parse(line) for line in text.splitlines())
    return [line for line in lines if isinstance(line, dict) and "kind" in line]


def read_summary(out: Path) -> Any:
    """The content of ``summary.json``, or None where there is none that can be read."""
    path = out / "summary.json"
    return _parse(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
