"""What a checkpoint's own keys cannot hold: prices and counters, in ``monge_state.safetensors`` beside it.

    model.save_pretrained(folder)      writes it too
    monge.hf.load_state(model, folder) reads it, and makes the model route by the router that wrote it

Keys are ``layers.N.<router>.<state>``, whatever wraps the model; the metadata name router and options.
"""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from monge.hf.adapter import RouterAdapter

STATE = "monge_state.safetensors"
FORMAT = "1"
SAVE = "save_pretrained"


def save_state(model: nn.Module, folder: str | Path) -> Path:
    """Write ``monge_state.safetensors`` into ``folder``: all that the routers know beside their weight.

    ``model.save_pretrained`` does it by itself; call this beside a PEFT adapter or a checkpoint of your own.

    Raises:
        ValueError: the model does not route by Monge.
    """
    gates = _named_adapters(model)
    if not gates:
        raise ValueError(f"{type(model).__name__} does not route by monge: call monge.hf.use_router first")
    first = next(iter(gates.values()))
    tensors = {
        f"{place}.{name}": value.detach().cpu().contiguous()
        for place, gate in gates.items()
        for name, value in _state_of(gate).items()
    }
    about = {"format": FORMAT, "router": first.method, "options": json.dumps(first.options)}
    path = Path(folder) / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.tmp")
    try:  # the file appears whole or not at all
        whole.write_bytes(save(tensors, metadata=about))
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    return path


def load_state(model: Any, folder: str | Path) -> Any:
    """Let ``model`` route by the router whose state is in ``folder``, and give it that state.

    Args:
        model: as for `monge.hf.use_router`; if it routes by another router already, that one goes.
        folder: of ``save_pretrained``, or the file itself.

    Raises:
        ValueError: there is no state, it is damaged, or it does not fit the model.

    Examples:
        >>> import monge
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("my-moe")  # doctest: +SKIP
        >>> model = monge.hf.load_state(model, "my-moe")  # doctest: +SKIP
    """
    path = _path(folder)
    about, tensors = _read(path)
    gates = _named_adapters(model)
    if not gates or any(gate.method != about["router"] for gate in gates.values()):
        from monge.hf.router import use_router

        use_router(model, about["router"], resume=False, **json.loads(about["options"]))
        gates = _named_adapters(model)
    expected = {f"{place}.{name}": v for place, gate in gates.items() for name, v in _state_of(gate).items()}
    shapes = {name: value.shape for name, value in tensors.items()}
    if shapes != {name: value.shape for name, value in expected.items()}:
        odd = sorted(set(shapes.items()) ^ {(name, value.shape) for name, value in expected.items()})
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {len(odd)} of its states differ, such as "
            f"{odd[0][0]}. It was saved with another model, or other options of router {about['router']!r}"
        )
    for place, gate in gates.items():
        state = {name: tensors[f"{place}.{name}"] for name in _state_of(gate)}
        gate.router.load_state_dict({**state, "weight": gate.weight})
        gate.tie()
        gate.write_bias()
    return model


def stored_router(folder: str | Path) -> str | None:
    """The name of the router whose state is in ``folder``, or None without one."""
    path = _path(folder)
    return _read(path)[0]["router"] if path.is_file() else None


def attach_saving(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` write the state too."""
    if hasattr(type(model), SAVE):
        # a bound method and no closure: a deep copy of the model is bound to the copy
        model.__dict__[SAVE] = types.MethodType(_save_pretrained, model)


def detach_saving(module: nn.Module) -> None:
    """Undo `attach_saving`."""
    module.__dict__.pop(SAVE, None)


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    from monge.hf.router import warn_of_stock

    if kwargs.get("is_main_process", args[0] if args else True):
        save_state(model, save_directory)  # first, so that an upload finds it
        warn_of_stock(model)
    return getattr(type(model), SAVE)(model, save_directory, *args, **kwargs)


def _named_adapters(model: nn.Module) -> dict[str, RouterAdapter]:
    """By their path from ``layers`` on; of the two in PEFT's modules_to_save, the one that is trained."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, RouterAdapter) and "original_module" not in name:
            name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
            found[name[name.rfind("layers.") :]] = module
    return found


def _state_of(gate: RouterAdapter) -> dict[str, Tensor]:
    return {name: value for name, value in gate.router.state_dict().items() if name != "weight"}


def _path(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    return path / STATE if path.suffix != ".safetensors" else path


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): save the model again, or start anew with monge.hf.use_router"
        ) from error
    if about.get("format") != FORMAT or not {"router", "options"} <= set(about):
        raise ValueError(f"{path} is no state of format {FORMAT}: install the version of Monge that wrote it")
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{path} holds NaN or infinite values in {bad[0]}: save the model again")
    return about, tensors
