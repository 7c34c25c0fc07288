"""The sections of the report below its headline: facts, results, method, cost, command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monge.viz import page
from monge.viz.columns import COLUMNS
from monge.viz.numbers import MISSING, count, duration, millions, milliseconds
from monge.viz.provenance import command_text, origin
from monge.viz.records import DENSE, Comparison
from monge.viz.style import colour_name

_METHOD = (
    "Small Llama language models are trained that differ in one thing, the router of their mixture of "
    "experts. For each seed they share the data order, and the initial values of all that they have in "
    "common. The dense baseline has the same active FLOPs per token. Validation routes every token on its "
    "own and drops none. Two models are ranked only where a t-test over seeds, pooled over the models, "
    "separates them at the 1 % level."
)


def facts(comparison: Comparison) -> str:
    """Runs, training, model and time in a strip."""
    rows, evals = comparison.rows, comparison.records.get("eval", [])
    if not rows:
        return ""
    row = next((row for row in rows if row["router"] != DENSE), rows[0])
    seeds = len({r["seed"] for r in evals})
    items = [("Runs", str(len(evals)), f"{_plural(len(rows), 'model')}, {_plural(seeds, 'seed')}")]
    if row.get("tokens"):
        items.append(("Training", f"{millions(row['tokens'])} tokens", f"{count(row['steps'])} steps a run"))
    if row.get("params_total"):
        active = row.get("params_active")
        remark = f"{millions(active)} active per token" if active else ""
        items.append(("Model", f"{millions(row['params_total'])} parameters", remark))
    items.append(
        ("Training time", duration(sum(float(r.get("wall_s") or 0) for r in evals)), "all runs together")
    )
    return page.facts(items)


def results(comparison: Comparison) -> str:
    """The table and what its columns mean."""
    rows = comparison.rows
    if not rows:
        return ""
    shown = [column for column in COLUMNS if any(column.cell(row) != MISSING for row in rows)]
    cells = [[row["router"], *(column.cell(row) for column in shown), str(row["seeds"])] for row in rows]
    titles = ["router", *(column.title for column in shown), "seeds"]
    return page.table(titles, cells, _dots(rows)) + page.meanings((c.title, c.meaning) for c in shown)


def method(comparison: Comparison) -> list[str]:
    """What was trained, on which text, where."""
    data = comparison.config.get("data", {})
    rows = [
        [
            str(domain.get("name", "")),
            *(count(len(domain.get(kind, []))) for kind in ("train_files", "val_files")),
            *(count(domain.get(kind)) for kind in ("train_tokens", "val_tokens")),
        ]
        for domain in data.get("domains", [])
    ]
    titles = ["text", "training files", "validation files", "training tokens", "validation tokens"]
    vocabulary = f"Vocabulary: {count(data['vocab'])} tokens." if data.get("vocab") else ""
    return [
        page.paragraph(_METHOD),
        page.table(titles, rows) if rows else "",
        page.paragraph(f"{vocabulary} {data.get('note') or ''}".strip()),
        *origin(comparison.config),
    ]


def cost(comparison: Comparison) -> str:
    """Parameters and time per router."""
    rows = []
    for row in comparison.rows:
        seconds = [
            float(r["wall_s"]) for r in comparison.of("eval", row["router"]) if r.get("wall_s") is not None
        ]
        rows.append(
            [
                row["router"],
                millions(row.get("params_total")),
                millions(row.get("params_active")),
                milliseconds(row.get("ms_step")),
                milliseconds(row.get("ms_route")),
                duration(sum(seconds) / len(seconds)) if seconds else MISSING,
            ]
        )
    titles = [
        "router",
        "parameters",
        "active per token",
        "ms per step",
        "routing, ms a layer",
        "training time of a run",
    ]
    return page.table(titles, rows, _dots(comparison.rows)) if rows else ""


def repetition(comparison: Comparison, out: Path) -> list[str]:
    """The command, every setting spelled out."""
    preset = str(comparison.config.get("preset", "quick"))
    settings = {name: value for name, value in comparison.settings.items() if name != "preset"}
    command = command_text(["monge", "compare", "--preset", preset, "--out", out.name], settings)
    note = "Every setting is spelled out, so that the command stays true where a preset changes."
    return [page.code(command), page.paragraph(note)]


def _dots(rows: list[dict[str, Any]]) -> list[str]:
    return [colour_name(row["router"]) for row in rows]


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
