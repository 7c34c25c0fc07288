"""`monge eval`: a converted model beside the dense one it came from."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from monge.cli.eval_tables import print_evaluation
from monge.cli.observing import make_stage_progress
from monge.cli.report import report_if_possible
from monge.cli.terminal import make_console, say
from monge.conversion.evaluation.settings import EvalConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what a converted model kept of the dense model it came from, and what it saves.

    Perplexity, KL divergence and agreement on held-out text, error and expert load of every layer,
    parameters, FLOPs and tokens per second, and zero-shot tasks on request. Repeating the command after an
    interruption goes on where it stopped.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """The converted model: a folder, a .gguf file or a hub name."""
    against: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """The dense model it was converted from: a folder, a .gguf file or a hub name."""
    settings: EvalConfig
    """What is measured, on which text."""
    out: Path = Path("runs/eval")
    """Folder for config.json, records.jsonl, summary.json and report.html; created if missing."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, measure, print."""
    parsed = tyro.cli(
        Arguments,
        args=arguments,
        prog="monge eval",
        description=inspect.getdoc(Arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("this needs transformers, not installed here: pip install 'monge[hf]'.")
    from monge.conversion.evaluation import evaluate
    from monge.workspace.records import Records

    console = make_console()
    say(console, f"{parsed.model} against {parsed.against}; records go to {parsed.out}")
    with make_stage_progress(console) as progress:
        summary = evaluate(parsed.model, parsed.against, parsed.settings, out=parsed.out, observer=progress)
    print_evaluation(console, Records(parsed.out / "records.jsonl").rows, summary)
    say(console, f"summary  {parsed.out / 'summary.json'}")
    report_if_possible(console, parsed.out)
