"""Reading an export back: a Monge checkpoint, or a standard one through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from monge.conversion.building import empty_moe
from monge.conversion.exporting.folder import ABOUT, FORMAT, INDEX, WEIGHTS
from monge.conversion.source import load_checked, quiet, require_transformers
from monge.workspace.finite import all_finite


def load(path: str | Path) -> nn.Module:
    """The model in the folder ``path``, in evaluation mode, in the dtype of its weights, on the CPU.

    A Monge checkpoint (`monge.export` where no standard architecture fits) becomes the source's model with
    `monge.MoE` in place of its FFNs; any other checkpoint of safetensors is read by transformers. Neither
    pickles nor a checkpoint's own code are read, and nothing is fetched from a network.

    Raises:
        ValueError: a file is missing, damaged, of another format, or does not fit the configuration.

    Examples:
        >>> from monge.conversion.loading import load
        >>> model = load("smollm2-moe")  # doctest: +SKIP
    """
    require_transformers()
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: name one that monge.export wrote, or a checkpoint's")
    config = _json(path, "config.json")
    about = _json(path, ABOUT) if (path / ABOUT).exists() else {}
    files = _weight_files(path)
    if about and about.get("format") != FORMAT:
        raise ValueError(
            f"{path / ABOUT} is of format {about.get('format')!r}, this version of Monge reads {FORMAT}: "
            "install the version that wrote it, or export the model anew"
        )
    if about.get("target") == "monge":
        return _load_monge(path, about, files)
    model_class = _class_of(next(iter(config.get("architectures") or []), None), path)
    return load_checked(model_class, path, dtype="auto")


def _load_monge(path: Path, about: dict[str, Any], files: list[Path]) -> nn.Module:
    from transformers import AutoConfig, GenerationConfig
    from transformers.initialization import no_init_weights

    model_class = _class_of(about.get("model"), path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            # memory that is never written is never taken: the dense FFNs cost nothing
            with no_init_weights():
                model = model_class(config)
            for name in about["removed"]:
                model.set_submodule(name, nn.Identity(), strict=True)
            for name, shape in about["layers"].items():
                model.set_submodule(name, empty_moe(shape), strict=True)
            _fill(model, _read(files))
            if (path / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a whole Monge checkpoint: {error}. Export the model anew") from error
    return model.eval()


def _fill(model: Any, tensors: dict[str, Tensor]) -> None:
    """Let ``tensors`` be the model's weights; the tied ones that the file leaves out follow."""
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    state = model.state_dict(keep_vars=True)
    read = {id(state[name]) for name in tensors if name in state}
    lost = [name for name in missing if id(state[name]) not in read]
    if lost or unexpected:
        raise RuntimeError(f"weights {lost[:4]} are missing and {unexpected[:4]} left over")
    if damaged := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
        raise RuntimeError(f"{damaged[:4]} hold NaN or infinite values")
    if unset := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise RuntimeError(f"{unset[:4]} have no values")


def _read(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}): fetch or export it anew") from error
    return tensors


def _weight_files(path: Path) -> list[Path]:
    """Raises ValueError if one of them is missing."""
    if (path / INDEX).exists():
        names = sorted(set(_json(path, INDEX).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: weights must be safetensors files (no pickles), all of them"
        )
    return [path / name for name in names]


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a checkpoint: it holds no {name}") from error
    except ValueError as error:
        raise ValueError(f"{path / name} is not JSON ({error}): fetch or export it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path / name} must hold a JSON object, not {type(value).__name__}")
    return value


def _class_of(name: str | None, path: Path) -> Any:
    import transformers

    found = getattr(transformers, name, None) if name else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"{path / 'config.json'} names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have: install the version that does"
        )
    return found
