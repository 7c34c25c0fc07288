"""Checkpoint folders that appear whole or not at all, and safetensors files in them.

A folder is written beside its place under a temporary name, which it then exchanges for its own. What stood
there before is replaced only if it is an export too, with nothing else in it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monge.workspace.finite import all_finite

FORMAT = 1
"""Of `ABOUT`; `monge.load` reads no other."""
ABOUT = "monge.json"
"""Names the target, the format and the files of an export; a Monge checkpoint's layers too."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_FILE = 5 * 10**9
"""Bytes of weights in a file; more are divided among several."""


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder that takes the place of ``out`` when the block is left without an error.

    Raises:
        ValueError: ``out`` is a file, or holds files that no export wrote.
        OSError: it cannot be written or the disk is full; what was at ``out`` is untouched, nothing is left.
    """
    check_replaceable(out)
    temporary, old = (out.with_name(f".{out.name}.{kind}") for kind in ("tmp", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # of an export that was killed
        if old.exists() and not out.exists():
            os.replace(old, out)
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)
        if (free := shutil.disk_usage(out.parent).free) < needed:
            raise OSError(
                errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB free"
            )
        temporary.mkdir()
        yield temporary
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(temporary, out)
        except BaseException:
            os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"cannot write {out}: {reason}. Free some space, or name another folder; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(out: Path) -> None:
    """Raises ValueError unless ``out`` is free, empty or an earlier export with nothing else in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out must be a folder; {out} is a file")
    found = {path.name for path in out.iterdir()}
    try:
        written = set(json.loads((out / ABOUT).read_text())["files"]) if found else set()
    except (OSError, ValueError, KeyError):
        written = set()
    if found - written:
        raise ValueError(
            f"{out} holds files that no export wrote ({', '.join(sorted(found - written)[:3])}): name a new "
            "folder, or empty this one"
        )


def write_about(folder: Path, target: str, **more: Any) -> None:
    """Write `ABOUT`, last of all files."""
    files = sorted([ABOUT, *(path.name for path in folder.iterdir())])
    about = {"format": FORMAT, "target": target, **more, "files": files}
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    largest: int = 0,
) -> None:
    """Write weights to safetensors, converted to ``dtype`` if one is given, one file's at a time in memory.

    Args:
        largest: bytes of weights in a file, where they should be fewer than `LARGEST_FILE`; 0 if not.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    largest = min(largest or LARGEST_FILE, LARGEST_FILE)
    pending: dict[str, Tensor] = {}
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if not all_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinite values: the model is damaged, convert it anew")
        tensor = tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        if pending and size + tensor.nbytes > largest:
            flush()
            size = 0
        pending[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    _name_files(folder, files, total)


def _name_files(folder: Path, files: list[list[str]], total: int) -> None:
    """The names that transformers expects, which tell how many files there are, and the index of several."""
    count = len(files)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        names = [WEIGHTS]
    for number, name in enumerate(names):
        part = folder / f"{number}.part"
        shutil.copymode(folder / "config.json", part)  # safetensors lets its owner alone read a file
        part.rename(folder / name)
    if count > 1:
        places = {key: name for name, keys in zip(names, files) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
