"""Tiny conversions of every family, what each is exported as, and the fresh process that reloads them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from converted_models import convert_by_hand
from elsewhere import WITHOUT_MONGE
from safetensors.torch import load_file, save_file
from torch import Tensor

from monge.conversion.exporting import export

TOKENS = 64  # of the greedy text


@dataclass(frozen=True)
class Case:
    """``family`` with ``config``, converted by hand with ``how``, exported ``to``: a ``target`` results."""

    family: str
    target: str
    how: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    to: str = "auto"


ROUTED = {"shared": 0}
ALL_ON = {"active": 8, "equal_gates": True}
BINARY = {"gates": "binary"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EVERYTHING = {
    "attention_bias": True, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
    "rope_parameters": LLAMA3, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}  # fmt: skip
WINDOW = {"sliding_window": 8}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

CASES = {
    "llama": Case("llama", "granitemoeshared"),
    "llama-routed": Case("llama", "mixtral", ROUTED),
    "llama-odd": Case("llama", "granitemoeshared", {"groups": 7, "active": 5}),
    "llama-everything": Case("llama", "granitemoeshared", {}, EVERYTHING),
    "llama-partly": Case("llama", "qwen2_moe", {"layers": [0, 2]}),
    "llama-partly-routed": Case("llama", "qwen2_moe", {"layers": [1], **ROUTED}),
    "llama-binary": Case("llama", "granitemoeshared", BINARY),
    "llama-binary-routed": Case("llama", "granitemoe", {**BINARY, **ROUTED}),
    "llama-one": Case("llama", "granitemoeshared", {"active": 3}),
    "llama-qwen2": Case("llama", "qwen2_moe", to="qwen2_moe"),
    "llama-all": Case("llama", "granitemoeshared", ALL_ON),
    "llama-routed-all": Case("llama", "mixtral", {**ROUTED, **ALL_ON}),
    "mistral": Case("mistral", "granitemoeshared"),
    "mistral-window": Case("mistral", "qwen2_moe", {}, WINDOW),
    "mistral-window-routed": Case("mistral", "mixtral", ROUTED, {**WINDOW, "head_dim": 16}),
    "qwen2": Case("qwen2", "qwen2_moe"),
    "qwen2-windows": Case("qwen2", "qwen2_moe", {}, SOME_WINDOWS),
    "qwen2-routed": Case("qwen2", "qwen2_moe", ROUTED),
    "qwen2-binary": Case("qwen2", "granitemoeshared", BINARY),
    "qwen2-all": Case("qwen2", "qwen2_moe", ALL_ON),
    "qwen3": Case("qwen3", "glm4_moe", {"gates": "sigmoid"}),
    "qwen3-odd": Case("qwen3", "glm4_moe", {"gates": "sigmoid", "groups": 7, "active": 5, "layers": [1, 2]}),
    "qwen3-routed": Case("qwen3", "qwen3_moe", {**ROUTED, "layers": [0, 1]}, {"attention_bias": True}),
    "qwen3-all": Case("qwen3", "glm4_moe", {"gates": "sigmoid", **ALL_ON}),
    "granite": Case("granite", "granitemoeshared", {}, MULTIPLIERS),
    "granite-routed": Case("granite", "granitemoe", ROUTED, {**MULTIPLIERS, "attention_bias": True}),
}

RELOAD = (
    WITHOUT_MONGE
    + """
import json
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file

def reload(folder, **options):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    wrong = {kind: keys for kind, keys in info.items() if keys}
    assert not wrong, (folder, wrong)
    return model.eval()

transformers.utils.logging.disable_progress_bar()
root = Path(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    ids = load_file(root / f"{folder.name}.inputs")["input_ids"]
    model = reload(folder, dtype="auto")
    with torch.no_grad():
        result = {
            "logits": model(input_ids=ids).logits,
            "text": model.generate(
                ids[:1, :8], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            ),
            "bfloat16": reload(folder, dtype=torch.bfloat16)(input_ids=ids).logits,
        }
    save_file({k: v.contiguous() for k, v in result.items()}, root / f"{folder.name}.outputs")
""".replace("TOKENS", str(TOKENS))
)


@dataclass(frozen=True)
class Exported:
    """One case: the models on this side, and what the fresh process got from the exported folder."""

    case: Case
    folder: Path
    about: dict[str, Any]
    model: Any
    dense: Any
    inputs: dict[str, Tensor]
    theirs: dict[str, Tensor]


def reload_elsewhere(root: Path, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """What a process without monge computes from the exports ``root/name`` on the inputs ``name.inputs``."""
    folders = [str(root / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(root), *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: load_file(root / f"{name}.outputs") for name in names}


def convert_case(case: Case, tiny_model: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    return convert_by_hand(tiny_model(case.family, **case.config), inputs, **case.how)


def export_all(
    root: Path, tiny_model: Callable[..., Any], tiny_inputs: Callable[..., Any]
) -> dict[str, Exported]:
    """Every case, exported and reloaded by one process in which monge cannot be imported."""
    here = {}
    for name, case in CASES.items():
        dense = tiny_model(case.family, **case.config)
        inputs = tiny_inputs(dense, length=48)
        model = convert_case(case, tiny_model, inputs)
        export(model, root / name, to=case.to)
        save_file(inputs, root / f"{name}.inputs")
        here[name] = (case, root / name, model, dense, inputs)
    theirs = reload_elsewhere(root, CASES)
    return {
        name: Exported(
            case,
            folder,
            json.loads((folder / "monge.json").read_text()),
            model,
            dense,
            inputs,
            theirs[name],
        )
        for name, (case, folder, model, dense, inputs) in here.items()
    }


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in standard deviations of the logits."""
    return float((ours - theirs).abs().max() / ours.std())


def assert_same_text(model: Any, input_ids: Tensor, theirs: Tensor) -> None:
    """Equal greedy tokens up to a position at which the two best logits are within 0.05 nats."""
    ours = model.generate(input_ids[:1, :8], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    assert ours.shape == theirs.shape == (1, TOKENS + 8)
    differing = (ours[0] != theirs[0]).nonzero().flatten()
    if len(differing):
        first = int(differing[0])
        best = logits_of(model, {"input_ids": ours[:, :first]})[0, -1].topk(2).values
        assert best[0] - best[1] < 0.05
