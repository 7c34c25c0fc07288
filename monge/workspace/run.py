"""The output folder of a command: ``config.json``, written before the first step and the same ever after."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from monge.workspace.machine import machine, versions
from monge.workspace.writing import write_json

OWN_FILES = ("records.jsonl", "summary.json", "tokenizer.json")


def stored_run(
    out: Path, command: str, settings: Mapping[str, Any], *, free: Collection[str] = ()
) -> dict[str, Any] | None:
    """What an earlier start of the same command with the same settings wrote, or None in a new folder.

    Settings named in ``free`` may be others than they were.

    Raises:
        ValueError: ``out`` holds something else, or a run with other settings; the message says which.
    """
    path = out / "config.json"
    if not path.exists():
        taken = [name for name in OWN_FILES if (out / name).exists()]
        if taken:
            raise ValueError(
                f"{out} holds {' and '.join(taken)} of something else (there is no config.json beside): "
                "name another folder with --out."
            )
        return None
    stored = _read(path, command)
    wanted = as_stored(settings)
    before = stored["config"]
    names = [n for n in {**before, **wanted} if n not in free and before.get(n) != wanted.get(n)]
    if names:
        changes = ", ".join(f"{name} (was {before.get(name)}, now {wanted.get(name)})" for name in names)
        raise ValueError(
            f"{out} holds an experiment with other settings: {changes}. Repeat its command to go on with "
            "it, or name another folder with --out."
        )
    return stored


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as ``config.json`` gives them back: tuples become lists."""
    return json.loads(json.dumps(dict(settings)))


def begin_run(out: Path, command: str, settings: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """Write ``config.json``: the command, its settings, versions, machine, and what else belongs there."""
    described = {
        "command": command,
        "config": dict(settings),
        "versions": versions(),
        "machine": machine(str(settings.get("device", "cpu"))),
        **about,
    }
    write_json(out / "config.json", described)
    return described


def check_digest(out: Path, what: str, stored: str, now: str) -> None:
    """Raise ValueError where what a run was begun with is not what is there now."""
    if stored != now:
        raise ValueError(
            f"the {what} has changed since {out} was begun, so it cannot go on there. "
            "Restore it, or name another folder with --out."
        )


def _read(path: Path, command: str) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
        if stored["command"] == command and stored["config"].keys():
            return stored
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} was not written by `monge {command}`: name another folder with --out.")
