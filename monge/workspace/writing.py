"""Writing that leaves nothing half-written: files appear whole, lines are appended whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def prepare_folder(folder: Path, needed: int) -> None:
    """Create `folder` and make sure, before anything is computed, that `needed` bytes can be written there.

    Raises:
        OSError: the folder cannot be made or written, or the disk is too full; the message names the remedy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _explained(folder, error) from error
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:.0f} MiB free, and the run needs about {needed / 2**20:.0f} MiB "
            "for its checkpoints. Free some space or name another folder with --out."
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Write the file whole or not at all: to a temporary file beside it, which then takes its name.

    Raises:
        OSError: it could not be written; what was at `path` is untouched and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C too
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _explained(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append `line` and a newline whole or not at all.

    Raises:
        OSError: it could not be written; the file is as long as before.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(file).st_size
            rest = memoryview(line.encode() + b"\n")
            try:
                while rest:  # a nearly full disk takes a part, then refuses the rest
                    rest = rest[os.write(file, rest) :]
            except BaseException:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
    except OSError as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write {path}: {error.strerror or error}. Free some space and repeat the command, which goes "
        "on from the last checkpoint, or name a folder that can be written with --out."
    )
