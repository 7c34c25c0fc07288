"""The safetensors files of a checkpoint: which they are, and the digest of what is in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read.

    Raises:
        ValueError: a file is missing or damaged, or there are pickles alone.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error}): fetch the checkpoint anew") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder}: of {len(names)} shards {some_of(missing)} missing: fetch them")
        return [folder / name for name in names]
    unsafe = sorted(file.name for file in folder.iterdir() if file.suffix in UNSAFE)
    if unsafe:
        raise ValueError(
            f"{folder} holds its weights as {unsafe[0]}, a format that can run code when it is read; only "
            "safetensors are read: convert it where you trust it (from_pretrained, then save_pretrained)"
        )
    raise ValueError(f"{folder} holds no model.safetensors: name a checkpoint's folder, or a .gguf file")


def digest_of(files: list[Path]) -> str:
    """sha256 of one file; of several, of their digests in that order."""
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def some_of(names: list[str]) -> str:
    """The first four, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
