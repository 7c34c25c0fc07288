"""Opening a checkpoint whose layers stay on disk (`monge.conversion.on_disk`).

    config.json --> model without values --> embeddings, norms and head read, layers on disk

Strict as `monge.conversion.source` is: weights that are missing or left over are an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from monge.conversion.on_disk import put_on_disk, read_tensors
from monge.conversion.source import quiet
from monge.conversion.weight_files import some_of, weight_files


def model_on_disk(model_class: Any, folder: Path) -> nn.Module:
    """The model of a folder of safetensors, in evaluation mode, float32, its layers on disk.

    A layer is an element of a `torch.nn.ModuleList`. Everything else is read here and stays in memory.

    Args:
        model_class: of transformers.

    Raises:
        ValueError: the weights do not belong to the configuration, or are named differently than the model's
            own; a file cannot be read; a weight is NaN or infinite.
    """
    keys = _keys_of(weight_files(folder))
    model = _without_values(model_class, folder)
    names = set(model.state_dict())
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if strange := sorted(
        key for key in keys if key not in names and not any(re.search(i, key) for i in ignored)
    ):
        raise _other_keys(folder, model_class, f"{some_of(strange)} unexpected")
    layers = _layers(model)
    outside = {name for name in names if not name.startswith(tuple(f"{path}." for path in layers))}
    if missing := sorted(names - outside - keys.keys()):
        raise _other_keys(folder, model_class, f"{some_of(missing)} missing")
    read = {name: keys[name] for name in outside if name in keys}
    model.load_state_dict(read_tensors(read), strict=False, assign=True)
    model.tie_weights()
    if missing := sorted(
        name for name, tensor in model.state_dict().items() if name in outside and tensor.is_meta
    ):
        raise _other_keys(folder, model_class, f"{some_of(missing)} missing")
    for path, layer in layers.items():
        put_on_disk(layer, {name: keys[f"{path}.{name}"] for name in layer.state_dict()})
    return model.eval()


def _without_values(model_class: Any, folder: Path) -> Any:
    """The model of a configuration, its parameters on the meta device."""
    from accelerate import init_empty_weights
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    with quiet():
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        config.dtype = torch.float32
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = model_class(config)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _keys_of(files: list[Path]) -> dict[str, tuple[Path, str]]:
    keys: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                keys |= {key: (file, key) for key in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kinds
            raise ValueError(f"{file} cannot be read ({error}): fetch the checkpoint anew") from error
    return keys


def _layers(model: nn.Module) -> Mapping[str, nn.Module]:
    """The elements of the outermost module lists, by path."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{path}." for path in layers)):
            layers |= {f"{name}.{index}": layer for index, layer in enumerate(module)}
    return layers


def _other_keys(folder: Path, model_class: Any, what: str) -> ValueError:
    return ValueError(
        f"{folder}: {what} for {model_class.__name__}. To be read layer by layer a checkpoint must name its "
        "weights as the model does, and be complete: fetch it anew, or write it once with transformers "
        "(from_pretrained, then save_pretrained)"
    )
