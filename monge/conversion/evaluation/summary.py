"""From the records of an evaluation to its summary."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from monge.conversion.evaluation.tasks import retention
from monge.workspace.records import Record


def summarise(rows: Sequence[Record], text: str) -> dict[str, Any]:
    """The figures of ``summary.json``; quality is that on ``text``. What was not measured is left out."""
    summary = _quality(rows, text) | _cost(rows)
    layers = _of(rows, "layer_eval")
    if layers:
        summary["layer_error"] = statistics.fmean(row["error"] for row in layers)
        summary["dead_experts"] = sum(row["dead"] for row in layers)
    for row in _of(rows, "speed"):
        suffix = _suffix(row)
        summary[f"prefill_tokens_per_s{suffix}"] = row["prefill_tokens_per_s"]
        summary[f"decode_tokens_per_s{suffix}"] = row["decode_tokens_per_s"]
    summary |= _tasks(rows)
    return summary | {"seconds": sum(row.get("seconds", 0.0) for row in rows)}


def _quality(rows: Sequence[Record], text: str) -> dict[str, Any]:
    row = next(r for r in _of(rows, "eval", model="converted", text=text) if not r.get("k_offset"))
    if "cosine" in row:
        return {"cosine": row["cosine"], "cosine_min": row["cosine_min"]}
    names = ("perplexity", "perplexity_dense", "kl", "agreement")
    return {name: row[name] for name in names} | {"ratio": row["perplexity"] / row["perplexity_dense"]}


def _cost(rows: Sequence[Record]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for row in _of(rows, "cost"):
        suffix = _suffix(row)
        figures |= {f"{name}{suffix}": row[name] for name in ("params_active", "params_total", "flops")}
        if not suffix:
            figures["ffn_active"] = row["ffn_active"]
    return figures


def _tasks(rows: Sequence[Record]) -> dict[str, Any]:
    dense = {row["task"]: row for row in _of(rows, "task", model="dense")}
    tasks = []
    for row in _of(rows, "task", model="converted"):
        before = dense[row["task"]]["accuracy"]
        kept = retention(row["accuracy"], before, row["chance"])
        tasks.append(
            {
                "task": row["task"],
                "metric": row["metric"],
                "count": row["count"],
                "chance": row["chance"],
                "accuracy": row["accuracy"],
                "accuracy_dense": before,
                "retained": kept.ratio,
                "retained_above_chance": kept.above_chance,
            }
        )
    if not tasks:
        return {}
    means = [statistics.fmean(t[name] for t in tasks) for name in ("accuracy", "accuracy_dense", "chance")]
    kept = retention(*means)
    return {"tasks": tasks, "retained": kept.ratio, "retained_above_chance": kept.above_chance}


def _of(rows: Sequence[Record], kind: str, **fields: Any) -> list[Record]:
    wanted = {"kind": kind, **fields}
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _suffix(row: Record) -> str:
    return "_dense" if row["model"] == "dense" else ""
