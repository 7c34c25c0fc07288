"""The sections of the report below its headline: facts, results, method, cost, command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monge.viz import page
from monge.viz.columns import CAPACITY, MEMORY, Column, columns_of
from monge.viz.corruption import MEANING, corruption_rows
from monge.viz.names import label
from monge.viz.numbers import MISSING, count, duration, loss, memory, millions, milliseconds
from monge.viz.provenance import command_text, origin
from monge.viz.records import DENSE, Comparison
from monge.viz.style import colour_name

_METHOD = (
    "Small {models} are trained that differ in one thing, the router of their mixture of experts. For each "
    "seed they share the data order, and the initial values of all that they have in common. The dense "
    "baseline has the same active FLOPs per token. Validation routes every token on its own and drops "
    "none. Differences are paired, seed by seed; two models are ranked only where the 95 % interval of "
    "their difference does not hold zero."
)
_BUDGET = (
    "Each run: {steps} steps of {batch} {examples}, AdamW (betas 0.9 and 0.98) at a peak learning rate of "
    "{lr:g}, {warmup} steps of linear warm-up, a cosine to {final_lr:.0%} of the peak, weight decay "
    "{weight_decay:g} on all but routers, norms, biases and embeddings, gradients clipped at {clip:g}. "
    "Model: {layers} layers of width {width}, {heads} heads, {experts} experts of width {expert_width} a "
    "layer, of which {top_k} process a token."
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
    seeds = Column("seeds", "Runs that the figures average over.", lambda row: str(row["seeds"]))
    return _table(rows, [*columns_of(rows), seeds])


def capacity(comparison: Comparison) -> list[str]:
    """What static capacities cost at inference."""
    rows = [row for row in comparison.rows if any(column.cell(row) != MISSING for column in CAPACITY)]
    return [_table(rows, list(CAPACITY))] if rows else []


def corruption(comparison: Comparison) -> list[str]:
    """The table behind the figure of corrupted inputs."""
    titles, cells = corruption_rows(comparison)
    if not cells:
        return []
    kinds = next(row["corrupted"] for row in comparison.rows if row.get("corrupted"))
    what = (
        "accuracy"
        if comparison.of_images
        else "increase of the loss, in nats, on tokens that were left in place"
    )
    strengths = "; ".join(f"{kind}: {MEANING[kind]}" for kind in kinds if kind in MEANING)
    return [
        page.table(titles, cells, _dots([row for row in comparison.rows if row.get("corrupted")])),
        page.paragraph(f"Means over seeds: {what}. Strengths: {strengths}."),
    ]


def domains(comparison: Comparison) -> list[str]:
    """The validation loss of every kind of text or image."""
    rows = [row for row in comparison.rows if row.get("val_loss_by_domain")]
    names = list(dict.fromkeys(name for row in rows for name in row["val_loss_by_domain"]))
    if len(names) < 2:
        return []
    cells = [
        [label(row["router"]), *(loss(row["val_loss_by_domain"].get(name)) for name in names)] for row in rows
    ]
    return [
        page.table(["router", *names], cells, _dots(rows)),
        page.paragraph(f"Validation loss, {comparison.unit}, means over seeds."),
    ]


def _table(rows: list[dict[str, Any]], columns: list[Column]) -> str:
    """The table and what its columns mean."""
    cells = [[label(row["router"]), *(column.cell(row) for column in columns)] for row in rows]
    titles = ["router", *(column.title for column in columns)]
    return page.table(titles, cells, _dots(rows)) + page.meanings((c.title, c.meaning) for c in columns)


def method(comparison: Comparison) -> list[str]:
    """What was trained, on which data, where."""
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
    models = "vision transformers" if comparison.of_images else "Llama language models"
    return [
        page.paragraph(_METHOD.format(models=models)),
        page.paragraph(_budget(comparison)),
        page.paragraph(_images(data)),
        page.table(titles, rows) if rows else "",
        page.paragraph(f"{vocabulary} {data.get('note') or ''}".strip()),
        *origin(comparison.config),
    ]


def _budget(comparison: Comparison) -> str:
    """The settings of a run in sentences, where ``config.json`` has them all."""
    settings = comparison.settings
    examples = "images" if comparison.of_images else f"sequences of {settings.get('context')} tokens"
    try:
        return _BUDGET.format(examples=examples, **{k: v for k, v in settings.items() if k != "examples"})
    except (KeyError, ValueError, TypeError):  # another version's settings
        return ""


def _images(data: dict[str, Any]) -> str:
    if "images" not in data:
        return ""
    size = data.get("size")
    return (
        f"Images: {data['images']}, {count(data.get('train_images'))} to train on and "
        f"{count(data.get('val_images'))} held out, {size} x {size} pixels, {data.get('classes')} classes, "
        f"{data.get('tokens_per_image')} tokens each."
    )


def cost(comparison: Comparison) -> str:
    """Parameters and time per router."""
    rows = []
    for row in comparison.rows:
        seconds = [
            float(r["wall_s"]) for r in comparison.of("eval", row["router"]) if r.get("wall_s") is not None
        ]
        rows.append(
            [
                label(row["router"]),
                millions(row.get("params_total")),
                millions(row.get("params_active")),
                milliseconds(row.get("ms_step")),
                milliseconds(row.get("ms_route")),
                duration(sum(seconds) / len(seconds)) if seconds else MISSING,
                memory(row.get("peak_memory_bytes")),
            ]
        )
    titles = [
        "router",
        "parameters",
        "active per token",
        "ms per step",
        "routing, ms a layer",
        "training time of a run",
        MEMORY.title,
    ]
    if not rows:
        return ""
    return page.table(titles, rows, _dots(comparison.rows)) + page.meanings([(MEMORY.title, MEMORY.meaning)])


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
