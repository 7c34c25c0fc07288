"""The report of conversions and evaluations: figures as files and one HTML page that stands on its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from monge.viz import page
from monge.viz.conversion import sections
from monge.viz.conversion.findings import findings, headline
from monge.viz.conversion.layers import draw_layers
from monge.viz.conversion.quality import draw_quality
from monge.viz.conversion.results import gather_results
from monge.viz.conversion.routing import draw_routing
from monge.viz.conversion.runs import Run, read_runs
from monge.viz.conversion.tasks import draw_tasks
from monge.viz.conversion.training import STAGE, draw_training
from monge.viz.files import REPORT, write_figures, write_whole, written_figures

FIGURES = ("quality", "layers", "routing", "training", "tasks")


def write_report(out: Path, beside: Sequence[Path] = ()) -> Path:
    """Read the records of a conversion or an evaluation; write figures and ``report.html`` beside them.

    The page needs nothing but itself, follows the reader's light or dark theme, and says so where the run is
    unfinished. The same records give the same bytes.

    Args:
        out: the folder with ``config.json`` and ``records.jsonl`` (and ``summary.json``, once finished).
        beside: folders of the same dense model and evaluation text, for the same table and plot.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a folder holds no ``config.json``.
        ValueError: a folder of another command, of another dense model or with other evaluation text.
        ImportError: matplotlib is missing (``pip install 'monge[plot]'``).
        OSError: the folder cannot be written; no file is left half-written.

    Examples:
        >>> from pathlib import Path
        >>> from monge.viz.conversion import write_report
        >>> write_report(Path("no-such-folder"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder holds no config.json, so no run was begun there: ...
    """
    runs = read_runs(out, beside)
    run, results = runs[0], gather_results(runs)
    quality, layers, routing, training, tasks = (
        write_figures(out, {name: draw})
        for name, draw in {
            "quality": partial(draw_quality, results),
            "layers": partial(draw_layers, run),
            "routing": partial(draw_routing, run),
            "training": partial(draw_training, results),
            "tasks": partial(draw_tasks, run),
        }.items()
    )
    title = _title(run)
    body = [
        page.header(f"Monge · {run.command}", title, headline(results)),
        *(_unfinished(one) for one in runs),
        page.listing(findings(run)),
        sections.facts(results[0]),
        page.section("Results", sections.results_table(results), *quality),
        page.section("By text and number of experts", sections.texts_table(run)),
        page.section("Layers and experts", _of_one(runs), *layers, *routing),
        page.section("Fine-tuning", *training),
        page.section("Zero-shot tasks", sections.tasks_table(run), *tasks),
        page.section("Cost and speed", sections.cost_table(run), page.paragraph(sections.speed_note(run))),
        page.section("Method and data", *sections.method(run)),
        page.section("To repeat it", *sections.repetition(runs, out)),
        page.footer("Made by Monge from config.json, records.jsonl and summary.json in this page's folder."),
    ]
    path = out / REPORT
    write_whole(path, page.page(f"{title} (Monge, {run.command})", body).encode())
    return path


def figure_paths(out: Path) -> list[Path]:
    """The figures that `write_report` left in the folder, sorted by name."""
    return written_figures(out, FIGURES)


def _title(run: Run) -> str:
    name = run.source[0] or "A dense model"
    if run.command == "eval":
        return f"{run.model} beside {name}"
    return f"{name}, pruned" if run.plan.get("method") == "static" else f"{name} as a Mixture of Experts"


def _of_one(runs: Sequence[Run]) -> str:
    """What is drawn once only is of the folder that the page lies in."""
    return page.paragraph(f"Of {runs[0].folder.name}." if len(runs) > 1 else "")


def _unfinished(run: Run) -> str:
    if run.complete:
        return ""
    trained = run.of("train", stage=STAGE)
    layers = run.plan.get("layers", [])
    if run.command == "eval":
        done = f"comparisons on text so far: {len(run.of('eval'))}"
    elif trained:
        done = f"fine-tuning is at step {trained[-1]['step']} of {trained[-1]['steps']}"
    else:
        done = f"layers converted so far: {len(run.of('layer'))} of {len(layers)}"
    return page.paragraph(
        f"Unfinished: {run.folder.name}, {done}. The same command goes on from here.", "notice"
    )
