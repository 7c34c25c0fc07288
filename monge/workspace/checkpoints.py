"""Checkpoints of a run: weights, AdamW's moments and the history so far, in one safetensors file.

Nothing is pickled, and the file is replaced whole. Random numbers need no state: every step seeds its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from monge.workspace.writing import write_atomic


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, history: dict[str, Tensor]) -> None:
    """Write the state after ``len(history[...])`` steps to `path`, whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"history.{name}": value for name, value in history.items()}
    write_atomic(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Restore `model` and `optimizer` in place; the history is returned.

    Raises:
        ValueError: the file is damaged or of another model.
    """
    try:
        tensors = load_file(path)
        part = {prefix: _under(tensors, prefix) for prefix in ("model.", "optimizer.", "history.")}
        model.load_state_dict(part["model."])
        parameters = dict(model.named_parameters())
        for key, value in part["optimizer."].items():
            moment, name = key.split(".", 1)
            parameter = parameters[name]
            # AdamW counts its steps on the CPU whatever the parameter's device.
            device = torch.device("cpu") if moment == "step" else parameter.device
            optimizer.state[parameter][moment] = value.to(device)
    except Exception as error:
        raise ValueError(
            f"the checkpoint {path} cannot be used ({error}). Delete it to train this run from its beginning."
        ) from error
    return part["history."]


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
