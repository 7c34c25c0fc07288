"""`monge demo`: the quick comparison with one seed, to see what this is about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from monge.cli.compare import compare_and_report
from monge.lab.presets import PRESETS

ROUTERS = ("dense", "topk", "ssr", "maxscore", "prices")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a dense model and four with experts, routed by top-k, SSR, MaxScore and prices, on real text.

    One seed each: a demonstration, no ranking. `monge compare` has more seeds and every option.
    """

    out: Path = Path("runs/demo")
    """Folder for records, figures and report.html; created if missing."""
    debug: bool = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, train, report."""
    parsed = tyro.cli(Arguments, args=arguments, prog="monge demo", config=(tyro.conf.FlagCreatePairsOff,))
    compare_and_report(replace(PRESETS["quick"], routers=ROUTERS, seeds=1), parsed.out)
