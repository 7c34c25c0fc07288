"""Writing a converted model as a checkpoint that any engine reads, or as one of Monge's own.

structure --> target --> configuration, renamed weights, tokenizer, card --> one folder, whole or not at all
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monge.conversion.exporting.card import model_card
from monge.conversion.exporting.choice import choose_target
from monge.conversion.exporting.folder import LARGEST_FILE, new_folder, write_about, write_tensors
from monge.conversion.exporting.structure import Structure
from monge.conversion.exporting.targets import ARCHITECTURES
from monge.conversion.exporting.tensors import own_tensors, renamed_tensors
from monge.conversion.on_disk import largest_layer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    converted: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    to: str = "auto",
    card: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Path:
    """Write ``converted`` to the folder ``out``: safetensors, configurations, tokenizer and a model card.

    A standard architecture (`monge.conversion.exporting.TARGETS`) computes the same function in any engine,
    without Monge, pickles or code of the checkpoint's own. The gates that `make_moe` folds into the weights
    are those of the architectures, so the weights are renamed, not approximated. What no standard
    architecture can hold becomes a Monge checkpoint, which `monge.load` reads.

    Args:
        converted: a model of transformers whose FFNs were replaced by `monge.MoE` or narrowed, or an object
            with such a ``model`` and a ``tokenizer``.
        out: a new folder, an empty one, or an earlier export, which is replaced once the new one is whole.
        tokenizer: of transformers, with its chat template; None takes that of ``converted``.
        to: a name of `TARGETS`, or "auto".
        card: figures and provenance for README.md and monge.json: plain values, and mappings of them, which
            become tables.
        dtype: "float32", "bfloat16" or "float16"; None keeps that of the model.

    Returns:
        The folder.

    Raises:
        ValueError: ``to`` cannot hold the model (the message names what can), ``out`` holds other files, or a
            weight is NaN or infinite.
        OSError: the folder cannot be written; what was there before is untouched.

    Examples:
        >>> from monge.conversion.exporting import export
        >>> export(model, "smollm2-moe", tokenizer=tokenizer)  # doctest: +SKIP
        PosixPath('smollm2-moe')
    """
    model, tokenizer = _parts(converted, tokenizer)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)} or None (that of the model); got {dtype!r}"
        )
    structure = Structure(model)
    target = choose_target(structure, to)
    kind = DTYPES[dtype] if dtype else None
    out = Path(out)
    bytes_each = kind.itemsize if kind else structure.dtype.itemsize
    needed = int(1.1 * bytes_each * sum(p.numel() for p in model.parameters())) + 2**20
    with new_folder(out, needed) as folder:
        config = _write_model(structure, target, folder, kind)
        if (generation := getattr(model, "generation_config", None)) is not None:
            generation.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shape = structure.shape if structure.moes else None
        card = dict(card or {})
        text = model_card(card, target=target, model_class=config.architectures[0], shape=shape)
        (folder / "README.md").write_text(text)
        more = {"layers": structure.shapes, "removed": _identities(model)} if target == "monge" else {}
        write_about(folder, target, model=config.architectures[0], **more, card=card)
    return out


def _parts(converted: Any, tokenizer: Any) -> tuple[nn.Module, Any]:
    model = converted
    if not isinstance(converted, nn.Module):
        model = getattr(converted, "model", None)
        tokenizer = tokenizer if tokenizer is not None else getattr(converted, "tokenizer", None)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            "converted must be a model of transformers, or an object with one as its .model; got "
            f"{type(converted).__name__}"
        )
    return model, tokenizer


def _write_model(structure: Structure, target: str, folder: Path, dtype: torch.dtype | None) -> Any:
    """config.json and the weights; returns the configuration."""
    model = structure.model
    if target == "dense":
        return _write_dense(structure, folder, dtype)
    if target == "monge":
        config = deepcopy(structure.config)
        config.architectures = [structure.model_class]
        tensors = own_tensors(model)
    else:
        config = ARCHITECTURES[target].config(structure)
        tensors = renamed_tensors(structure, ARCHITECTURES[target])
    config.dtype = dtype or structure.dtype
    config.save_pretrained(folder)
    write_tensors(folder, tensors, dtype, largest_layer(model))
    return config


def _write_dense(structure: Structure, folder: Path, dtype: torch.dtype | None) -> Any:
    """A model without experts, by transformers itself, with the width that its FFNs have now."""
    model: Any = structure.model
    source, config = model.config, _narrowed(model)
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()} if dtype else None
    try:
        model.config = config
        model.save_pretrained(folder, state_dict=weights, max_shard_size=LARGEST_FILE)
    finally:
        model.config = source
    config.architectures, config.dtype = [structure.model_class], dtype or structure.dtype
    config.save_pretrained(folder)  # once more: save_pretrained knows the model's own dtype only
    return config


def _narrowed(model: Any) -> Any:
    """A copy of the configuration that says how wide the FFNs are.

    Raises:
        ValueError: they differ in width, or the configuration does not know it.
    """
    from monge.conversion.ffn import find_ffns

    config = deepcopy(model.config)
    if _fits(model, config):
        return config
    widths = {ffn.read().neurons for ffn in find_ffns(model)}
    name = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
    if len(widths) == 1:
        setattr(config, name, widths.pop())
        if _fits(model, config):
            return config
    raise ValueError(
        f"the FFNs of this {type(model).__name__} have {sorted(widths)} neurons, and its configuration knows "
        f"one width for all ({name}): prune all layers alike"
    )


def _fits(model: nn.Module, config: Any) -> bool:
    """Whether a model made from ``config`` has weights of the shapes of ``model``'s."""
    with torch.device("meta"):
        twin = type(model)(deepcopy(config))
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (model, twin)]
    return shapes[0] == shapes[1]


def _identities(model: nn.Module) -> list[str]:
    """Paths of the modules that do nothing, among them those that an installed FFN left behind."""
    return [name for name, module in model.named_modules() if type(module) is nn.Identity]
