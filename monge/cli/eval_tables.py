"""The tables at the end of `monge eval`: quality, cost, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from monge.cli.terminal import say
from monge.viz.numbers import MISSING, count, duration, millions, percent

Line = tuple[str, ...]
OFFSETS = {0: "converted", -1: "one expert less", 1: "one expert more"}


def print_evaluation(console: Console, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """All tables that the records have something for, and what the layers say in a line."""
    if "cosine" in summary:
        _print(console, ("text", "chunks", "cosine", "worst"), _cosines(rows))
    else:
        _print(console, ("text", "model", "perplexity", "ratio", "KL, nats", "agreement"), _quality(rows))
    _print(console, ("", "dense", "converted", "ratio"), _costs(summary))
    if summary.get("tasks"):
        titles = ("task", "rows", "chance", "dense", "converted", "kept", "kept above chance")
        _print(console, titles, _tasks(summary))
    layers = [row for row in rows if row["kind"] == "layer_eval"]
    if layers:
        worst = max(layers, key=lambda row: row["error"])
        say(
            console,
            f"Layers: relative error {summary['layer_error']:.3f} on average, {worst['error']:.3f} at worst "
            f"(layer {worst['layer']}); {summary['dead_experts']} experts that no token took.",
        )
    memory = summary["peak_memory_bytes"] / 2**30
    say(console, f"{duration(summary['seconds'])}, peak memory {memory:.1f} GiB with both models.")


def _quality(rows: Sequence[dict[str, Any]]) -> list[Line]:
    lines: list[Line] = []
    for row in rows:
        if row["kind"] != "eval":
            continue
        dense = row["perplexity_dense"]
        if row["model"] == "converted" and row["k_offset"] == 0:
            lines.append((row["text"], "dense", f"{dense:.3f}", "1", "0", percent(1.0)))
        name = OFFSETS[row["k_offset"]] if row["model"] == "converted" else "oracle neurons"
        figures = (f"{row['perplexity']:.3f}", f"{row['perplexity'] / dense:.3f}", f"{row['kl']:.4f}")
        lines.append((row["text"], name, *figures, percent(row["agreement"])))
    return lines


def _cosines(rows: Sequence[dict[str, Any]]) -> list[Line]:
    return [
        (row["text"], count(row["chunks"]), f"{row['cosine']:.4f}", f"{row['cosine_min']:.4f}")
        for row in rows
        if row["kind"] == "eval"
    ]


def _costs(summary: dict[str, Any]) -> list[Line]:
    measures = [
        ("parameters", "params_total", millions),
        ("active parameters", "params_active", millions),
        ("FLOPs per token", "flops", millions),
        ("prefill, tokens/s", "prefill_tokens_per_s", count_of),
        ("decoding, tokens/s", "decode_tokens_per_s", count_of),
    ]
    lines: list[Line] = [
        ("FFN neurons active", percent(1.0), percent(summary["ffn_active"]), f"{summary['ffn_active']:.3f}")
    ]
    for title, name, written in measures:
        if name in summary:
            now, before = summary[name], summary[f"{name}_dense"]
            lines.append((title, written(before), written(now), f"{now / before:.3f}"))
    return lines


def _tasks(summary: dict[str, Any]) -> list[Line]:
    lines: list[Line] = [
        (
            f"{task['task']} ({task['metric']})",
            count(task["count"]),
            percent(task["chance"]),
            percent(task["accuracy_dense"]),
            percent(task["accuracy"]),
            percent(task["retained"]),
            percent(task["retained_above_chance"]),
        )
        for task in summary["tasks"]
    ]
    kept = percent(summary["retained"]), percent(summary["retained_above_chance"])
    return [*lines, ("mean", MISSING, MISSING, MISSING, MISSING, *kept)] if len(lines) > 1 else lines


def count_of(rate: float) -> str:
    """A rate, with one decimal below a hundred."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _print(console: Console, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for index, title in enumerate(titles):
        words = index == 0 or title == "model"
        table.add_column(title, justify="left" if words else "right", style="bold" if index == 0 else None)
    for line in lines:
        table.add_row(*line)
    console.print(table)
