"""What commands print: complaints on stderr, the table of results and the paths of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from monge.viz.columns import Column, columns_of
from monge.viz.names import label

# Columns that go, one after the other, where the terminal is too narrow for all.
_DROPPED_FIRST = (
    "leak, KL", "OT steps", "own routing", "ms routing", "ms / step", "specialisation", "bias gradient",
    "bias left", "dead", "imbalance, train", "leak",
)  # fmt: skip


def make_console(*, quiet: bool = False) -> Console:
    """A console on stdout, wide enough for the table when it is no terminal; a quiet one prints nothing."""
    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, width=120, quiet=quiet)


def say(console: Console, text: str) -> None:
    """A paragraph, wrapped only where someone watches: in a file it stays one line."""
    console.print(text, soft_wrap=not console.is_terminal, markup=False)


def complain(program: str, text: str) -> None:
    """One paragraph on stderr."""
    console = Console(stderr=True, highlight=False)
    paragraph = Text.assemble((f"{program}: ", "bold red"), text)
    console.print(paragraph, soft_wrap=not console.is_terminal)


def print_results(console: Console, rows: list[dict[str, Any]], finding: str) -> None:
    """The table of a comparison and what it allows to be said."""
    columns = columns_of(rows)
    for dropped in range(len(_DROPPED_FIRST) + 1):
        table = _table([c for c in columns if c.title not in _DROPPED_FIRST[:dropped]], rows)
        if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
            break
    console.print(table)
    say(console, finding)


def _table(columns: list[Column], rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("router", style="bold", no_wrap=True)
    for column in columns:
        table.add_column((column.brief or column.title).replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(label(row["router"]), *(column.cell(row) for column in columns))
    return table


def print_paths(console: Console, report: Path, figures: list[Path]) -> None:
    """Where to look."""
    console.print()
    console.print(f"report   {report}", soft_wrap=True, markup=False)
    for path in figures:
        if path.suffix == ".png":
            console.print(f"figure   {path} (and .svg)", soft_wrap=True, markup=False)
