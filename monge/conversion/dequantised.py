"""GGUF files as checkpoints of safetensors, converted once into a cache folder.

The folder is named after the sha256 of the GGUF file, appears whole or not at all, and is checked by the
sha256 of its weights each time, so that a damaged one is built anew. It lies in ``MONGE_CACHE`` or
``~/.cache/monge``.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from monge.conversion.source import INSTALL_HF, load_checked, quiet
from monge.conversion.weight_files import sha256_of
from monge.workspace.writing import write_json

SEAL = "monge_cache.json"  # written last: the digests of the GGUF file and of the weights made from it
WEIGHTS = "model.safetensors"


def dequantise(path: Path) -> tuple[Path, str]:
    """The folder with the float32 weights and the tokenizer of a GGUF file, and the file's sha256.

    Raises:
        ValueError: the package gguf is missing, the file is damaged or of an unknown architecture.
        OSError: the cache cannot be written; the message names ``MONGE_CACHE``.
    """
    digest = sha256_of(path)
    cache = Path(os.environ.get("MONGE_CACHE") or "~/.cache/monge").expanduser()
    folder = cache / f"{path.stem}-{digest[:16]}"
    if _intact(folder, digest):
        return folder, digest
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {path.name} needs the package gguf: {INSTALL_HF}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as place:
            built = Path(place) / "built"
            _convert(path, built, digest)
            if folder.exists():
                shutil.rmtree(folder)
            try:
                built.rename(folder)
            except OSError:  # another process was faster
                if not _intact(folder, digest):
                    raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot keep the converted weights of {path.name} in {cache} ({_reason(error)}): free some "
            "space there, or name another folder with the environment variable MONGE_CACHE"
        ) from error
    return folder, digest


def _convert(path: Path, folder: Path, digest: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        model: Any = load_checked(AutoModelForCausalLM, path.parent, gguf_file=path.name, dtype=torch.float32)
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            raise ValueError(f"the tokenizer in {path} cannot be read: {error}") from error
    # The weights are plain float32 now; with these marks transformers would refuse to write them.
    for owner in (model, model.config):
        for mark in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            owner.__dict__.pop(mark, None)
    with quiet():
        model.save_pretrained(folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(folder)
    write_json(folder / SEAL, {"gguf": digest, "weights": sha256_of(folder / WEIGHTS)})


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _intact(folder: Path, digest: str) -> bool:
    try:
        seal = json.loads((folder / SEAL).read_text())
        return seal == {"gguf": digest, "weights": sha256_of(folder / WEIGHTS)}
    except (OSError, ValueError):
        return False
