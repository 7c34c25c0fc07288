"""The report of a comparison: its figures as files and one HTML page that stands on its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from monge.viz import page, sections
from monge.viz.corruption import draw_corruption
from monge.viz.curves import draw_losses, draw_violation
from monge.viz.dots import draw_final
from monge.viz.files import REPORT, write_figures, write_whole, written_figures
from monge.viz.findings import findings, headline
from monge.viz.heatmap import draw_loads
from monge.viz.paired import draw_differences
from monge.viz.records import DENSE, Comparison, read_comparison
from monge.viz.style import Drawing, note
from monge.viz.sweep import draw_sweep

_FIGURES = {
    "differences": draw_differences,
    "final": draw_final,
    "sweep": draw_sweep,
    "losses": draw_losses,
    "violation": draw_violation,
    "loads": draw_loads,
    "corruption": draw_corruption,
}
_NUMBERS = (
    "No",
    "One",
    "Two",
    "Three",
    "Four",
    "Five",
    "Six",
    "Seven",
    "Eight",
    "Nine",
    "Ten",
    "Eleven",
    "Twelve",
)


def write_report(out: Path) -> Path:
    """Read the records of a comparison; write its figures (PNG and SVG) and ``report.html`` beside them.

    The page needs nothing but itself: no script, no font, no network. It follows the reader's light or dark
    theme. An unfinished comparison gives a report that says so. The same records give the same bytes.

    Args:
        out: the folder with ``config.json`` and ``records.jsonl`` (and ``summary.json``, once finished).

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no ``config.json`` in ``out``.
        ValueError: ``config.json`` is not a JSON object.
        ImportError: matplotlib is missing (``pip install 'monge[plot]'``).
        OSError: the folder cannot be written; no file is left half-written.

    Examples:
        >>> from pathlib import Path
        >>> from monge.viz import write_report
        >>> write_report(Path("no-such-folder"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder holds no config.json, so no run was begun there: ...
    """
    comparison = read_comparison(out)
    drawings = write_figures(out, {name: partial(_drawn, name, comparison) for name in _FIGURES})
    path = out / REPORT
    write_whole(path, _compose(comparison, drawings, out).encode())
    return path


def figure_paths(out: Path) -> list[Path]:
    """The figures that `write_report` left in the folder, sorted by name."""
    return written_figures(out, _FIGURES)


def _drawn(name: str, comparison: Comparison, *, wide: bool) -> Drawing | None:
    """A figure, which says on its face where the experts were made unequal on purpose."""
    drawing = _FIGURES[name](comparison, wide=wide)
    if drawing is not None and comparison.synthetic:
        note(
            drawing.figure,
            comparison.synthetic if wide else comparison.synthetic.replace(" starts", "\nstarts"),
        )
    return drawing


def _compose(comparison: Comparison, drawings: list[str], out: Path) -> str:
    title, preset = _title(comparison), str(comparison.config.get("preset", ""))
    kind = f"{preset} (synthetic)" if comparison.synthetic else preset
    body = [
        page.header(f"Monge · compare · {kind}", title, headline(comparison)),
        _unfinished(comparison),
        page.listing(findings(comparison)),
        sections.facts(comparison),
        page.section("Results", sections.results(comparison)),
        page.section("Figures", *drawings),
        page.section("Inference at a static capacity", *sections.capacity(comparison)),
        page.section("Corrupted input", *sections.corruption(comparison)),
        page.section("By domain", *sections.domains(comparison)),
        page.section("Method and data", *sections.method(comparison)),
        page.section("Cost", sections.cost(comparison)),
        page.section("To repeat it", *sections.repetition(comparison, out)),
        page.footer("Made by Monge from config.json, records.jsonl and summary.json in this page's folder."),
    ]
    return page.page(f"{title} (Monge, {kind})", body)


def _title(comparison: Comparison) -> str:
    sparse = sum(name != DENSE for name in comparison.routers)
    number = _NUMBERS[sparse] if sparse < len(_NUMBERS) else str(sparse)
    dense = " and a dense baseline" if DENSE in comparison.routers else ""
    return f"{number} router{'' if sparse == 1 else 's'}{dense}"


def _unfinished(comparison: Comparison) -> str:
    if comparison.complete:
        return ""
    done = f"{comparison.finished_runs} of {comparison.planned_runs} runs have finished"
    return page.paragraph(f"Unfinished: {done}. The same command goes on from here.", "notice")
