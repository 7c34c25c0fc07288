"""`monge convert`: a dense checkpoint in, a standard Mixture-of-Experts checkpoint out."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from monge.cli.launching import joined
from monge.cli.observing import make_stage_progress
from monge.cli.report import report_if_possible
from monge.cli.terminal import make_console, say
from monge.conversion.config import ConvertConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Turn the dense FFNs of a model into Mixtures of Experts and write a checkpoint that any engine loads.

    Calibrates, divides the neurons of every layer, fits its router and refits its output projection in closed
    form, fine-tunes within --minutes, and measures the result on held-out text. Repeating the command after
    an interruption goes on where it stopped. Under torchrun all processes share the steps of training.
    """

    model: tyro.conf.Positional[str]
    """The dense model: a folder, a .gguf file or a hub name."""
    settings: ConvertConfig
    """How it is converted, on which text."""
    out: Path = Path("runs/convert")
    """Folder for model/ (the checkpoint), config.json, records.jsonl, summary.json and report.html."""
    stream: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave the layers of the model on disk and read each when its turn comes, for one larger than memory."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, convert, print."""
    parsed = tyro.cli(
        Arguments,
        args=arguments,
        default=Arguments(model=tyro.MISSING, settings=ConvertConfig()),
        prog="monge convert",
        description=inspect.getdoc(Arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    convert_and_report(parsed.model, parsed.settings, parsed.out, stream=parsed.stream)


def convert_and_report(
    model: str | Path, settings: ConvertConfig, out: Path, *, stream: bool = False
) -> dict[str, Any]:
    """Convert with live progress, print the figures, write the report; returns the summary."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("this needs transformers, not installed here: pip install 'monge[hf]'.")
    from monge.conversion import convert

    with joined(settings.device) as prints:
        console = make_console(quiet=not prints)
        say(console, f"{model} to {out}")
        with make_stage_progress(console) as progress:
            result = convert(model, settings, out=out, observer=progress, stream=stream)
        _print(console, result.summary)
        say(console, f"model    {result.path}")
        if prints:
            report_if_possible(console, out)
    return result.summary


def _print(console: Console, summary: dict[str, Any]) -> None:
    table = Table("", "dense", "converted", box=box.SIMPLE_HEAD)
    for name in ("perplexity",):
        if name in summary:
            ratio = summary[name] / summary[f"{name}_dense"]
            table.add_row(name, f"{summary[f'{name}_dense']:.2f}", f"{summary[name]:.2f} ({ratio:.2f}x)")
    rows = {
        "KL to dense, nats": ("kl", "{:.3f}"),
        "equal first choices": ("agreement", "{:.1%}"),
        "embedding cosine": ("cosine", "{:.4f}"),
        "FFN neurons active": ("ffn_active", "{:.0%}"),
    }
    for title, (name, form) in rows.items():
        if name in summary:
            table.add_row(title, "", form.format(summary[name]))
    active = summary["params_active"] / summary["params_total"]
    table.add_row("parameters active", "", f"{summary['params_active'] / 1e6:.1f} M ({active:.0%})")
    table.add_row("time", "", f"{summary['seconds']:.0f} s")
    table.add_row("peak memory", "", f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB")
    console.print(table)
