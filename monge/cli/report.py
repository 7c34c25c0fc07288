"""`monge report`: figures and page again from the records, also of an unfinished comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from monge.cli.terminal import make_console, print_paths, print_results


@dataclass(frozen=True)
class Arguments:
    """Draw the figures and the report of a comparison again from its records, finished or not."""

    folder: tyro.conf.Positional[Path]
    """The folder that was --out of the comparison."""
    debug: bool = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, draw, print."""
    from monge.viz import figure_paths, headline, read_comparison, write_report

    parsed = tyro.cli(Arguments, args=arguments, prog="monge report", config=(tyro.conf.FlagCreatePairsOff,))
    console = make_console()
    comparison = read_comparison(parsed.folder)
    print_results(console, comparison.rows, headline(comparison))
    print_paths(console, write_report(parsed.folder), figure_paths(parsed.folder))
