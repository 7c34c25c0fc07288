"""Opening any model by its path: a dense checkpoint, an export, or a Monge checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from monge.conversion.exporting.folder import ABOUT
from monge.conversion.loading import load
from monge.conversion.source import Source, open_model, quiet
from monge.conversion.weight_files import digest_of


def open_any(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Source:
    """Open whatever `monge.convert` reads or `monge.export` writes, with its tokenizer.

    Raises:
        ValueError: there is no such model, or it cannot be read; the message names the file and the remedy.

    Examples:
        >>> from monge.conversion.opening import open_any
        >>> converted = open_any("smollm2-moe")  # doctest: +SKIP
    """
    path = Path(model).expanduser()
    if not _is_monge(path):
        source = open_model(model, dtype=dtype)
        source.model.to(device)
        return source
    loaded: Any = load(path).to(device, dtype)
    reads_text = loaded.main_input_name == "input_ids"
    digest = digest_of(sorted(path.glob("*.safetensors")))
    tokenizer = _tokenizer(path) if reads_text else None
    name = path.resolve().name
    return Source(loaded, tokenizer, loaded.config, name, path, digest, causal=loaded.can_generate())


def _is_monge(path: Path) -> bool:
    try:
        return json.loads((path / ABOUT).read_text()).get("target") == "monge"
    except (OSError, ValueError, AttributeError):
        return False


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its reader meets
        raise ValueError(
            f"the tokenizer in {path} cannot be opened ({error}): copy the dense model's files into it"
        ) from error
