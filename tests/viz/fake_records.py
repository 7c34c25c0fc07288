"""A synthetic output folder of `monge compare`: plausible curves without training anything."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np

from monge.lab.paired import paired_difference

EXPERTS, LAYERS = 16, 2
# final loss, violation in training and on the validation set, dead experts, leak, ms routing, ms step
ROUTERS = {
    "dense": (4.4526, None, None, None, None, None, 61.0),
    "topk": (4.3105, 1.41, 1.38, 0.7, 0.0, 0.4, 74.0),
    "ssr": (4.3137, 1.46, 1.52, 0.7, 0.055, 1.9, 79.0),
    "maxscore": (4.3047, 0.0, 0.38, 0.0, 0.058, 6.1, 84.0),
    "prices": (4.3082, 0.20, 0.17, 0.0, 0.0, 0.6, 75.0),
    "switch": (4.3061, 0.35, 0.34, 0.0, 0.0, 0.5, 75.0),
}
OWN_LOSS = {"maxscore": -0.006, "ssr": -0.002}


def write_fake_run(
    out: Path,
    *,
    routers: tuple[str, ...] = ("dense", "topk", "ssr", "maxscore", "prices"),
    seeds: int = 3,
    steps: int = 400,
    spread: float = 0.004,
    loads: bool = True,
    interrupt_after: int | None = None,
    router_bias: float = 0.0,
    images: bool = False,
) -> Path:
    """Write config.json, records.jsonl and summary.json to ``out`` and return it.

    Args:
        out: the folder, created if missing.
        routers: names among ``ROUTERS``.
        seeds: runs per router.
        steps: training steps per run.
        spread: standard deviation of the final loss over seeds.
        loads: write the per-layer load records.
        interrupt_after: stop in the middle of the run with this index; no summary is written then.
        router_bias: of a synthetic start.
        images: classify images instead of modelling text.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(
        json.dumps(_config(routers, seeds, steps, router_bias, images), indent=1)
    )
    lines: list[dict] = []
    evals: list[dict] = []
    runs = [(seed, router) for seed in range(seeds) for router in routers]
    for index, (seed, router) in enumerate(runs):
        cut = interrupt_after is not None and index == interrupt_after
        lines += _training(router, seed, steps // 2 if cut else steps, steps, loads)
        if cut:
            break
        evals.append(_evaluation(router, seed, steps, spread, router_bias, images))
        lines.append(evals[-1])
    (out / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if interrupt_after is None:
        (out / "summary.json").write_text(
            json.dumps([_summary(r, evals, routers) for r in routers], indent=1)
        )
    return out


def _training(router: str, seed: int, until: int, steps: int, loads: bool) -> list[dict]:
    shared = np.random.default_rng([seed, 1])  # one data order per seed: most of the noise is common
    own = np.random.default_rng([seed, 2, *router.encode()])
    final, violation, *_ = ROUTERS[router.partition(":")[0]]
    skew = own.normal(size=(LAYERS, EXPERTS))
    lines = []
    for step in range(1, until + 1):
        common = shared.normal(scale=0.04)
        if step % 5 and step != 1:
            continue
        progress = step / steps
        gap = (final - 4.30) * progress
        loss = 4.30 + gap + 2.6 * math.exp(-9 * progress) + 0.25 * (1 - progress) + common
        lines.append(
            {
                "kind": "train",
                "router": router,
                "seed": seed,
                "step": step,
                "loss": loss + own.normal(scale=0.006),
                "tokens_per_s": 12_000.0 + own.normal(scale=300),
                "max_violation": None
                if violation is None
                else max(
                    0.0, violation * (1 + 2 * math.exp(-12 * progress)) + own.normal(scale=violation / 9)
                ),
                "lr": 4e-3,
            }
        )
        if loads and violation is not None and (step % 20 == 0 or step == 1):
            lines += [
                {
                    "kind": "load",
                    "router": router,
                    "seed": seed,
                    "step": step,
                    "layer": layer,
                    "loads": _loads(skew[layer], violation, progress),
                }
                for layer in range(LAYERS)
            ]
        if step % (steps // 8) == 0:
            val = {"kind": "val", "router": router, "seed": seed, "step": step, "val_loss": loss + 0.02}
            lines.append(val)
    return lines


def _loads(skew_E: np.ndarray, violation: float, progress: float) -> list[float]:
    """Shares of the tokens whose largest is about (1 + violation) / E."""
    if violation == 0:
        return [1 / EXPERTS] * EXPERTS
    weights_E = np.exp(skew_E * min(1.2, violation * 0.6) * (1 + math.exp(-8 * progress)))
    return (weights_E / weights_E.sum()).tolist()


def _evaluation(router: str, seed: int, steps: int, spread: float, router_bias: float, images: bool) -> dict:
    own = np.random.default_rng([seed, 3, *router.encode()])
    final, train_violation, violation, dead, leak, ms_route, ms_step = ROUTERS[router.partition(":")[0]]
    sparse = violation is not None
    kinds = {"noise": 0.9, "salt": 0.8} if images else {"random tokens": 0.3, "swapped words": 0.1}
    loss = final + own.normal(scale=spread)
    skew = own.normal(size=(LAYERS, EXPERTS))
    of_images = {"accuracy": 0.95 - loss / 100, "accuracy_corrupted": 0.8 - loss / 100} if images else {}
    return of_images | {
        "kind": "eval",
        "router": router,
        "seed": seed,
        "step": steps,
        "val_loss": loss,
        "val_loss_own": loss + OWN_LOSS.get(router, 0.0),
        "train_max_violation": train_violation,
        "max_violation": violation,
        "dead_experts": dead,
        "leak": leak,
        "ms_route": ms_route,
        "ms_step": ms_step,
        "wall_s": steps * ms_step / 1000,
        "ot_steps": 20 if router == "ssr" else None,
        "params_total": 1_393_000,
        "params_active": 361_000,
        "peak_memory_bytes": 5e8,
        "corrupted": {kind: {"0.1": base / 2, "0.2": base} for kind, base in kinds.items()},
        "val_loss_by_domain": {"speeches": final - 0.2, "plays": final + 0.2},
        **{
            f"val_loss{own}_{name}": final + rise if sparse else None
            for own in ("", "_own")
            for name, rise in (("cf1", 0.1), ("cf125", 0.02))
        },
        "leak_kl": leak and leak / 100,
        "specialisation": 0.12 if sparse else None,
        "bias_gap": 2.5 if sparse and router_bias else None,
        "bias_gradient": 1e-3 if sparse and router_bias else None,
        "loads": None
        if violation is None
        else [_loads(skew[layer], violation, 1.0) for layer in range(LAYERS)],
    }


def _summary(router: str, evals: list[dict], routers: tuple[str, ...]) -> dict:
    def minus(field: str) -> dict:
        mine, others = {e["seed"]: e[field] for e in evals if e["router"] == router}, {}
        for name in routers:
            theirs = {e["seed"]: e[field] for e in evals if e["router"] == name}
            others |= {name: paired_difference(mine, theirs)} if name != router else {}
        return others

    mine = [e for e in evals if e["router"] == router]
    losses = [e["val_loss"] for e in mine]
    row = {
        k: v
        for k, v in mine[0].items()
        if k not in ("kind", "seed", "step", "loads", "val_loss", "val_loss_own")
    }
    if "accuracy" in row:
        row["accuracy_minus"] = minus("accuracy")
    return row | {
        "minus": minus("val_loss"),
        "seeds": len(mine),
        "val_loss_mean": statistics.fmean(losses),
        "val_loss_std": statistics.stdev(losses) if len(mine) > 1 else None,
        "val_loss_own_mean": statistics.fmean(e["val_loss_own"] for e in mine),
        "steps": mine[0]["step"],
        "tokens": mine[0]["step"] * 1024,
    }


def _config(routers: tuple[str, ...], seeds: int, steps: int, router_bias: float, images: bool) -> dict:
    config = _text_config(routers, seeds, steps)
    config["config"]["router_bias"] = router_bias
    if images:
        config["data"] = {"images": "digits", "train_images": 90, "val_images": 10, "classes": 10, "size": 8}
        config["data"] |= {"tokens_per_image": 17, "note": ""}
    return config


def _text_config(routers: tuple[str, ...], seeds: int, steps: int) -> dict:
    return {
        "command": "compare",
        "preset": "quick",
        "config": {
            "routers": list(routers),
            "seeds": seeds,
            "text": [],
            "steps": steps,
            "batch_tokens": 1024,
            "layers": LAYERS,
            "experts": EXPERTS,
            "top_k": 2,
            "lr": 4e-3,
        },
        "versions": {"monge": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"cpu": "an ordinary CPU", "cores": 2, "threads": 2},
        "data": {
            "domains": [
                {
                    "name": "speeches",
                    "train_files": [f"{i}.txt" for i in range(237)],
                    "val_files": [f"{i}.txt" for i in range(237, 249)],
                    "train_tokens": 3_412_880,
                    "val_tokens": 171_204,
                },
                {
                    "name": "plays",
                    "train_files": [f"{i}.md" for i in range(36)],
                    "val_files": ["36.md", "37.md"],
                    "train_tokens": 1_502_113,
                    "val_tokens": 88_012,
                },
            ],
            "vocab": 1024,
            "note": "Whole files are held out: no validation file is seen in training.",
        },
    }
