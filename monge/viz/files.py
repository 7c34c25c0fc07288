"""The files of a report: written whole or not at all, every figure as PNG, as SVG and inside the page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from monge.viz import page
from monge.viz.style import Drawing, standalone, to_png, to_svg

REPORT = "report.html"


class Draw(Protocol):
    """Draws a figure for a laptop or for a phone; None where the records have nothing for it."""

    def __call__(self, *, wide: bool) -> Drawing | None: ...


def write_figures(out: Path, figures: Mapping[str, Draw]) -> list[str]:
    """Write ``NAME.png`` and ``NAME.svg`` of every figure that has data; return them as HTML."""
    drawings = []
    for name, draw in figures.items():
        wide, narrow = draw(wide=True), draw(wide=False)
        if wide is None or narrow is None:
            continue
        svg = to_svg(wide.figure, name)
        write_whole(out / f"{name}.png", to_png(wide.figure))
        write_whole(out / f"{name}.svg", standalone(svg).encode())
        drawings.append(page.figure(svg, to_svg(narrow.figure, f"{name}-narrow"), wide.caption))
    return drawings


def written_figures(out: Path, names: Iterable[str]) -> list[Path]:
    """Those of the named figures that lie in the folder, sorted by name."""
    paths = [out / f"{name}.{kind}" for name in sorted(names) for kind in ("png", "svg")]
    return [path for path in paths if path.is_file()]


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all: to a file beside it, which then takes its name.

    Raises:
        OSError: it could not be written; what was at ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"cannot write {path}: {reason}. Free some space or make the folder writable."
        ) from error
