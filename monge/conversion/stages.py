"""Working files of a conversion: what each stage leaves for a later start, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from monge.workspace.writing import write_atomic


class Stages:
    """Named sets of tensors in a folder; without a folder nothing is kept. They come back on ``device``.

    Examples:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from monge.conversion.stages import Stages
        >>> stages = Stages(Path(tempfile.mkdtemp()))
        >>> stages.save("layer-0", {"labels": torch.tensor([1, 0])}, {"lam": 0.1})
        >>> stages.load("layer-0")
        ({'labels': tensor([1, 0])}, {'lam': 0.1})
        >>> stages.load("layer-1") is None
        True
    """

    def __init__(self, folder: Path | None, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = folder, device

    def path(self, name: str) -> Path | None:
        """Where ``name`` is or would be, for stages that write their own checkpoints."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write tensors and plain values under ``name``, replacing what was there.

        Raises:
            OSError: it could not be written; what was there is untouched.
        """
        if (path := self.path(name)) is not None:
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            write_atomic(path, save(whole, metadata={"about": json.dumps(dict(about))}))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved under ``name``, or None.

        Raises:
            ValueError: the file is damaged; the message names it.
        """
        path = self.path(name)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                names, about = file.keys(), json.loads(file.metadata()["about"])
                return {name: file.get_tensor(name).to(self.device) for name in names}, about
        except Exception as error:
            raise ValueError(
                f"the stage file {path} is damaged ({error}). Delete its folder, and the same command "
                "computes the stages anew."
            ) from error

    def clear(self) -> None:
        """Delete the folder: the conversion is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
