"""The report of `monge bench`: figures as files and one HTML page that stands on its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from monge.viz import page
from monge.viz.files import REPORT, write_figures, write_whole, written_figures
from monge.viz.provenance import command_text, origin
from monge.viz.speed.figures import draw_inference, draw_models, draw_training
from monge.viz.speed.run import SpeedRun, headline, read_speed, tables

FIGURES = {"inference": draw_inference, "training": draw_training, "models": draw_models}
MEANINGS = (
    ("path", "The compute path that Monge's table chooses for the case."),
    ("eager, batched_mm, grouped_mm", "transformers' three ways to compute the same experts."),
    ("over the best", "Monge's figure over the best of transformers' three."),
    ("memory", "The most memory in use during a step over that before it."),
    ("dense without FFNs", "The dense model whose FFNs cost nothing: attention and head alone."),
)


def write_report(out: Path) -> Path:
    """Read the records; write the figures (PNG and SVG) and ``report.html`` beside them.

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
        >>> from monge.viz.speed import write_report
        >>> write_report(Path("no-such-folder"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder holds no config.json, so no run was begun there: ...
    """
    run = read_speed(out)
    drawings = write_figures(out, {name: partial(draw, run) for name, draw in FIGURES.items()})
    title = "The speed of the experts"
    body = [
        page.header("Monge · bench", title, headline(run)),
        "" if run.complete else page.paragraph("Unfinished: repeat the command, it goes on.", "notice"),
        page.section("Figures", *drawings),
        *(page.section(name, page.table(columns, rows)) for name, columns, rows in tables(run)),
        page.section("What the columns mean", page.meanings(MEANINGS)),
        page.section("How it was measured", page.paragraph(_method(run)), *origin(run.about)),
        page.section("To repeat it", page.code(_command(run, out))),
        page.footer("Made by Monge from config.json and records.jsonl in this page's folder."),
    ]
    path = out / REPORT
    write_whole(path, page.page(f"{title} (Monge, bench)", body).encode())
    return path


def figure_paths(out: Path) -> list[Path]:
    """The figures that `write_report` left in the folder, sorted by name."""
    return written_figures(out, FIGURES)


def _method(run: SpeedRun) -> str:
    config = run.about.get("config", {})
    clock = "CPU time of one thread" if config.get("cpu_time") else "wall time"
    return (
        f"All candidates of a case take turns in one process, in {config.get('repeats')} rounds whose order "
        f"rotates; the median counts, of {clock}. The routing is random and changes from call to call. "
        f"Forward: hidden states of width {config.get('dim')}, {config.get('experts')} experts of "
        f"{config.get('hidden')} neurons. Times of two machines, or of one under different loads, do not "
        "compare; the ratios do."
    )


def _command(run: SpeedRun, out: Path) -> str:
    settings = {name: value for name, value in run.about.get("config", {}).items() if value != ""}
    return command_text(["monge", "bench", "--out", out.name], settings)
