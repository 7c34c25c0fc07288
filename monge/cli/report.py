"""`monge report`: figures and page again from the records, also of an unfinished run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from monge.cli.audit import report_audit
from monge.cli.bench import report_speed
from monge.cli.terminal import make_console, print_paths, print_results, say


@dataclass(frozen=True)
class Arguments:
    """Draw figures and report of a run of compare, convert, eval, audit or bench again, finished or not."""

    folder: tyro.conf.Positional[Path]
    """The folder that was --out of the run."""
    beside: tuple[Path, ...] = ()
    """Further folders of convert and eval, of the same dense model and text, for the same table and plot."""
    debug: bool = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, draw, print."""
    from monge.viz.reading import read_config

    parsed = tyro.cli(Arguments, args=arguments, prog="monge report", config=(tyro.conf.FlagCreatePairsOff,))
    console = make_console()
    command = read_config(parsed.folder).get("command", "compare")
    if command == "audit":
        if parsed.beside:
            raise ValueError("--beside is for folders of convert and eval: an audit is of one model")
        report_audit(console, parsed.folder)
    elif command == "bench":
        if parsed.beside:
            raise ValueError("--beside is for folders of convert and eval: a benchmark stands alone")
        report_speed(console, parsed.folder)
    elif command != "compare":
        report_conversion(console, parsed.folder, parsed.beside)
    elif parsed.beside:
        raise ValueError(
            "--beside is for folders of convert and eval: a comparison has all its models in one"
        )
    else:
        _report_comparison(console, parsed.folder)


def report_conversion(console: Console, out: Path, beside: Sequence[Path] = ()) -> None:
    """Say what was found, write the report, print its paths."""
    from monge.viz.conversion import figure_paths, gather_results, headline, read_runs, write_report

    say(console, headline(gather_results(read_runs(out, beside))))
    print_paths(console, write_report(out, beside), figure_paths(out))


def report_if_possible(console: Console, out: Path) -> None:
    """The same at the end of a command whose work is done; without matplotlib a line instead."""
    if importlib.util.find_spec("matplotlib") is None:
        say(console, f"For figures and report.html: pip install 'monge[plot]', then monge report {out}")
    else:
        report_conversion(console, out)


def _report_comparison(console: Console, out: Path) -> None:
    from monge.viz import figure_paths, headline, read_comparison, write_report

    comparison = read_comparison(out)
    print_results(console, comparison.rows, headline(comparison))
    print_paths(console, write_report(out), figure_paths(out))
