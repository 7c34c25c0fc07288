"""The report of an audit: figures as files and one HTML page that stands on its own."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from monge.viz import page
from monge.viz.audit.figures import draw_layers, draw_loads
from monge.viz.audit.run import AuditRun, findings, headline, read_audit
from monge.viz.files import REPORT, write_figures, write_whole, written_figures
from monge.viz.numbers import MISSING, count, figure, percent, ratio
from monge.viz.provenance import command_text, origin

FIGURES = {"loads": draw_loads, "layers": draw_layers}
MEANINGS = (
    ("imbalance", "Largest load of an expert over the mean load, minus one: 0 is perfect balance."),
    ("dead", "Experts that no token of the text reached."),
    ("copies", "Pairs of experts whose outputs on the same tokens differ by less than 5 % of their norm."),
    ("closest", "The smallest such difference of any two experts; 0 is an exact copy."),
    ("domain", "Mutual information of expert and text domain, as a share of the domain's entropy."),
    (
        "drops",
        "Slots that a static capacity would drop, by its factor of an equal share of a batch; a batch is of "
        "one domain.",
    ),
    ("flips", "Slots whose expert changes when the whole model computes in the other precision."),
    ("batch", "Slots whose expert changes when a sequence is run alone, in evaluation."),
    (
        "leak",
        "Slots in the first half of a sequence whose expert changes with the second, in evaluation.",
    ),
    ("batch, training; leak, training", "The same with the routes that the router takes in training."),
)


def write_report(out: Path) -> Path:
    """Read the records of an audit; write its figures (PNG and SVG) and ``report.html`` beside them.

    The page needs nothing but itself and follows the reader's light or dark theme. The same records give the
    same bytes.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no ``config.json`` in ``out``.
        ValueError: the folder is of another command.
        ImportError: matplotlib is missing (``pip install 'monge[plot]'``).
        OSError: the folder cannot be written; no file is left half-written.

    Examples:
        >>> from pathlib import Path
        >>> from monge.viz.audit import write_report
        >>> write_report(Path("no-such-folder"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder holds no config.json, so no run was begun there: ...
    """
    run = read_audit(out)
    drawings = write_figures(out, {name: partial(draw, run) for name, draw in FIGURES.items()})
    title = f"The routing of {run.model}"
    body = [
        page.header("Monge · audit", title, headline(run)),
        "" if run.complete else page.paragraph("Unfinished: repeat the command.", "notice"),
        page.listing(findings(run)),
        _facts(run),
        page.section("Figures", *drawings),
        page.section("Layers", _layers(run)),
        page.section("Text", _domains(run)),
        page.section("Model and machine", page.paragraph(_model(run)), *origin(run.about)),
        page.section("To repeat it", _repetition(run, out)),
        page.footer("Made by Monge from config.json, records.jsonl and summary.json in this page's folder."),
    ]
    path = out / REPORT
    write_whole(path, page.page(f"{title} (Monge, audit)", body).encode())
    return path


def figure_paths(out: Path) -> list[Path]:
    """The figures that `write_report` left in the folder, sorted by name."""
    return written_figures(out, FIGURES)


def _facts(run: AuditRun) -> str:
    if not run.complete:
        return ""
    found = run.summary
    return page.facts(
        [
            ("Imbalance", ratio(found["max_violation"]), "mean over layers"),
            ("Dead experts", count(found["dead_experts"]), f"of {count(found['experts'])}"),
            ("Copies", count(found["duplicate_pairs"]), "pairs of experts"),
            ("Loss", f"{found['loss']:.4f}", f"perplexity {figure(found['perplexity'])}"),
            ("Text", f"{count(found['tokens'])} tokens", f"{count(found['sequences'])} sequences"),
        ]
    )


def layer_rows(run: AuditRun) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of layers, for the page and the terminal; only what was measured."""
    known = math.log(max(len(run.summary.get("domains", {})), 2))
    columns = {
        "layer": [str(row["layer"]) for row in run.layers],
        "experts": [f"{row['top_k']} of {row['num_experts']}" for row in run.layers],
        "imbalance": [ratio(row["max_violation"]) for row in run.layers],
        "dead": [count(len(row["dead"])) for row in run.layers],
        "copies": [count(len(row["duplicates"])) for row in run.layers],
        "closest": [ratio(row["closest"]) for row in run.layers],
        "domain": [_share(row["information"], known) for row in run.layers],
    }
    for factor in run.layers[0]["drops"] if run.layers else ():
        columns[f"drops {factor}"] = [percent(row["drops"][factor]) for row in run.layers]
    for name in ("flips", "batch_dependence", "leak", "batch_dependence_training", "leak_training"):
        title = name.replace("batch_dependence", "batch").replace("_training", ", training")
        columns[title] = [_share(row[name]) for row in run.layers]
    shown = {title: cells for title, cells in columns.items() if set(cells) != {MISSING}}
    return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]


def _layers(run: AuditRun) -> str:
    if not run.layers:
        return ""
    titles, rows = layer_rows(run)
    return page.table(titles, rows) + page.meanings(MEANINGS)


def _domains(run: AuditRun) -> str:
    losses = run.summary.get("domains", {})
    rows = [[name, f"{loss:.4f}", figure(math.exp(min(loss, 700)))] for name, loss in losses.items()]
    return page.table(["domain", "loss, nats per token", "perplexity"], rows) if rows else ""


def _model(run: AuditRun) -> str:
    about = run.about.get("model", {})
    digest = f", sha256 {about['digest'][:16]}…" if about.get("digest") else ""  # whole in config.json
    routed = f" It routes by Monge's {about['router']}." if about.get("router") else ""
    return f"{run.model} ({about.get('architecture', 'unknown architecture')}{digest}).{routed}"


def _repetition(run: AuditRun, out: Path) -> str:
    settings = dict(run.about.get("config", {}))
    model = str(settings.pop("model", "MODEL"))
    return page.code(command_text(["monge", "audit", model, "--out", out.name], settings))


def _share(value: float | None, whole: float = 1.0) -> str:
    return MISSING if value is None else percent(value / whole)
