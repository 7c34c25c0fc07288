"""The sections of the page below its headline: facts, results, texts, cost, tasks, method, command."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monge.viz import page
from monge.viz.conversion.columns import COLUMNS
from monge.viz.conversion.results import Result, dense_row, oracle_row
from monge.viz.conversion.runs import CONVERTED, DENSE, ORACLE, Run
from monge.viz.conversion.tasks import kept, paired_tasks
from monge.viz.numbers import MISSING, count, duration, figure, millions, percent, rate
from monge.viz.provenance import command_text, origin
from monge.viz.reading import Record
from monge.viz.style import colour_name

OFFSETS = {-1: "one expert less", 0: CONVERTED, 1: "one expert more"}


def facts(result: Result) -> str:
    """Quality, shares and time of the first result in a strip."""
    row, run = result.row, result.runs[0]
    items = []
    if row["ratio"] is not None:
        remark = f"{figure(row['perplexity'])} against {figure(row['perplexity_dense'])}"
        items.append(("Perplexity", f"{figure(row['ratio'])} times dense", remark))
    if row["cosine"] is not None:
        items.append(("Cosine", figure(row["cosine"]), "with dense embeddings"))
    if row["ffn_active"] is not None:
        remark = f"{percent(row['active'])} of all parameters" if row["active"] is not None else ""
        items.append(("FFN neurons active", percent(row["ffn_active"]), remark))
    if row["kl"] is not None:
        items.append(
            ("KL to dense", f"{figure(row['kl'])} nats", f"{percent(row['agreement'])} equal first choices")
        )
    if run.summary.get("seconds") is not None:
        memory = run.summary.get("peak_memory_bytes")
        remark = f"peak memory {memory / 2**30:.1f} GiB" if memory else ""
        items.append(("Time", duration(run.summary["seconds"]), remark))
    return page.facts(items)


def results_table(results: Sequence[Result]) -> str:
    """One row per result between the dense model and the oracles, and what the columns mean."""
    rows = [(DENSE, dense_row(results[0].runs[0])), *((result.name, result.row) for result in results)]
    oracles = {}
    for result in results:
        oracle = oracle_row(result.runs[0])
        if oracle is not None:
            oracles[oracle["ffn_active"]] = oracle
    rows += [(ORACLE, oracle) for oracle in oracles.values()]
    shown = [column for column in COLUMNS if any(column.cell(row) != MISSING for _, row in rows)]
    measured = {result.name for result in results}
    cells = [
        [name, *(column.cell(row) for column in shown), str(row["seeds"]) if name in measured else MISSING]
        for name, row in rows
    ]
    titles = ["method", *(column.title for column in shown), "seeds"]
    dots = [colour_name(name) for name, _ in rows]
    return page.table(titles, cells, dots) + page.meanings((column.title, column.meaning) for column in shown)


def texts_table(run: Run) -> str:
    """An evaluation's figures on every text, with one expert more and less, and of the oracle."""
    rows = run.of("eval")
    if len(rows) < 2:
        return ""
    if "cosine" in rows[0]:
        cells = [
            [r["text"], figure(r["cosine"]), figure(r.get("cosine_min")), count(r.get("chunks"))]
            for r in rows
        ]
        return page.table(["text", "cosine", "of the worst chunk", "chunks"], cells)
    cells = []
    for row in rows:
        name = OFFSETS.get(row.get("k_offset") or 0, "") if row["model"] == CONVERTED else row["model"]
        dense = row["perplexity_dense"]
        if name == CONVERTED:
            cells.append(
                [row["text"], DENSE, figure(dense), "1", "0", percent(1.0), count(row.get("tokens"))]
            )
        figures = [figure(row["perplexity"]), figure(row["perplexity"] / dense), figure(row["kl"])]
        cells.append([row["text"], name, *figures, percent(row["agreement"]), count(row.get("tokens"))])
    return page.table(["text", "model", "perplexity", "ratio", "KL", "agreement", "predictions"], cells)


def cost_table(run: Run) -> str:
    """Parameters, FLOPs and tokens per second, dense beside converted."""
    costs = {row["model"]: row for row in run.of("cost")}
    speeds = {row["model"]: row for row in run.of("speed")}
    plan, summary = run.plan, run.summary
    dense, converted = costs.get(DENSE, {}), costs.get(CONVERTED, {})
    total = summary.get("params_total") or converted.get("params_total") or plan.get("params_total")
    active = summary.get("params_active") or converted.get("params_active") or plan.get("params_active")
    before = dense.get("params_total") or plan.get("params_dense")
    lines = [
        ("parameters stored", before, total, millions),
        ("parameters active per token", before, active, millions),
        (
            "FLOPs per token",
            dense.get("flops") or plan.get("flops_dense"),
            converted.get("flops") or plan.get("flops"),
            millions,
        ),
    ]
    names = {"prefill_tokens_per_s": "prefill, tokens/s", "decode_tokens_per_s": "decoding, tokens/s"}
    lines += [
        (title, speeds.get(DENSE, {}).get(name), speeds.get(CONVERTED, {}).get(name), rate)
        for name, title in names.items()
    ]
    cells = [
        [title, write(a), write(b), f"{b / a:.3f}" if a and b else MISSING]
        for title, a, b, write in lines
        if a is not None or b is not None
    ]
    return page.table(["", "dense", "converted", "ratio"], cells) if cells else ""


def speed_note(run: Run) -> str:
    """How the tokens per second were taken."""
    row = next(iter(run.of("speed")), None)
    if row is None:
        return ""
    sizes = (
        f"a prompt of {row['prompt']} tokens, then {row['decode']} greedy tokens one at a time"
        if "prompt" in row
        else ""
    )
    threads = run.settings.get("threads")
    return (
        f"Speed: {sizes or 'one prompt'}, {threads} threads, medians; both models took turns."
        if threads
        else ""
    )


def tasks_table(run: Run) -> str:
    """Every zero-shot task, and their mean."""
    tasks = paired_tasks(run)
    if not tasks:
        return ""
    cells = []
    for before, after in tasks:
        a, b, chance = before["accuracy"], after["accuracy"], before["chance"]
        title = f"{before['task']} ({before['metric']})"
        cells.append([title, count(before["count"]), *_accuracies(chance, a, b)])
    if len(tasks) > 1:
        means = [
            statistics.fmean(values)
            for values in (
                [before["chance"] for before, _ in tasks],
                [before["accuracy"] for before, _ in tasks],
                [after["accuracy"] for _, after in tasks],
            )
        ]
        cells.append(["mean", MISSING, *_accuracies(*means)])
    return page.table(["task", "rows", "chance", "dense", "converted", "kept", "kept above chance"], cells)


def _accuracies(chance: float, dense: float, converted: float) -> list[str]:
    shares = [chance, dense, converted, kept(dense, converted), kept(dense, converted, chance)]
    return [percent(share) for share in shares]


def method(run: Run) -> list[str]:
    """What was done to which model, on which text, where."""
    lists = run.about.get("data", {}).get("files", {})
    tokens = {"calibration": run.settings.get("tokens"), "evaluation": run.settings.get("eval_tokens")}
    if run.command == "eval":
        tokens = dict.fromkeys(lists, run.settings.get("tokens"))
    rows = [[name, count(len(files)), count(tokens.get(name))] for name, files in lists.items()]
    return [
        page.paragraph(_conversion(run)),
        page.paragraph(_refit(run.method_settings)),
        page.table(["text", "files", "tokens used"], rows) if rows else "",
        *origin(run.about),
    ]


def _conversion(run: Run) -> str:
    plan, name = run.plan, run.source[0]
    if not plan:
        return f"{run.model or 'The model'} beside {name or 'the dense model'}, from which it was converted."
    neurons, groups, active, shared = plan["shape"]
    size = -(-neurons // groups)
    layers = f"{len(plan['layers'])} of {plan['layer_count']} layers"
    if plan.get("method") == "static":
        kept_neurons = neurons * active // groups
        return (
            f"{name}: in {layers} the {count(kept_neurons)} strongest of {count(neurons)} FFN neurons stay."
        )
    parts = [f"a shared expert of {count(shared * size)}"] if shared else []
    parts.append(f"{groups - shared} routed experts of {size}, of which a token uses {active - shared}")
    return (
        f"{name}: in {layers} the {count(neurons)} FFN neurons become {' and '.join(parts)}, "
        f"by {plan['method']}."
    )


def _refit(settings: Record) -> str:
    if not settings:
        return ""
    parts = [] if settings.get("method") == "static" else [f"router: {settings.get('router')}"]
    parts.append("output projection refitted" if settings.get("refit") else "output projection not refitted")
    parts.append(f"gates: {settings.get('gates')}")
    if settings.get("minutes"):
        parts.append(
            f"fine-tuning of {settings.get('trainable')} weights for {settings['minutes']:g} minutes"
        )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def repetition(runs: Sequence[Run], out: Path) -> list[str]:
    """The command of the first run, every setting spelled out, and that of this page."""
    run = runs[0]
    settings: dict[str, Any] = dict(run.settings)
    if run.command == "convert":
        source = run.about.get("source", {})
        words = ["monge", "convert", str(source.get("path") or "MODEL")]
    else:
        words = [
            "monge",
            "eval",
            str(settings.pop("model", "MODEL")),
            "--against",
            str(settings.pop("against", "")),
        ]
    name, digest = run.source
    notes = [f"The dense model is {name}{f', sha256 {digest}' if digest else ''}."]
    steps = run.made_by.get("finetune_steps")
    if steps and run.command == "convert":
        notes.append(
            f"On this machine {settings.get('minutes'):g} minutes were planned as {count(steps)} steps."
        )
    report = ["monge", "report", out.name]
    others = [other.folder.name for other in runs[1:]]
    parts = [page.code(command_text([*words, "--out", out.name], settings)), page.paragraph(" ".join(notes))]
    if others:
        parts.append(page.code(shlex.join([*report, "--beside", *others])))
    return parts
