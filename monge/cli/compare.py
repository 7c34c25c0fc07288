"""`monge compare`: train models that differ in their router alone, live, and write the report."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path

import tyro

from monge.cli.launching import joined
from monge.cli.progress import make_progress
from monge.cli.terminal import make_console, print_paths, print_results, say
from monge.lab.config import CompareConfig, ExperimentConfig, VisionConfig
from monge.lab.presets import PRESETS

_NEEDED = ("transformers", "tokenizers", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class TextArguments:
    """Train small models on real text or images that differ in their router alone, and compare them.

    Repeating the command after an interruption goes on where it stopped, and with more routers or seeds adds
    those to what is there. Under torchrun all processes share every batch.
    """

    settings: CompareConfig
    """What is trained, on which text, for how long."""
    out: Path = Path("runs/compare")
    """Folder for records, figures and report.html; created if missing."""
    debug: bool = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class VisionArguments(TextArguments):
    """The same with images."""

    settings: VisionConfig  # type: ignore[assignment]
    """What is trained, on which images, for how long."""


def run(arguments: list[str]) -> None:
    """Parse, train, report."""
    settings = PRESETS[_preset(arguments)]
    kind = VisionArguments if isinstance(settings, VisionConfig) else TextArguments
    parsed = tyro.cli(
        kind,
        args=arguments,
        default=kind(settings=settings),  # type: ignore[arg-type]
        prog="monge compare",
        description=f"{inspect.getdoc(TextArguments)}\n\nPresets: {', '.join(PRESETS)}.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    compare_and_report(parsed.settings, parsed.out)


def compare_and_report(settings: ExperimentConfig, out: Path) -> None:
    """Run the comparison with live progress, print its table and write its report."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:  # before the training, not after it
        raise ImportError(
            f"this needs {' and '.join(missing)}, not installed here: pip install 'monge[lab]'."
        )
    from monge.lab import compare
    from monge.viz import figure_paths, headline, read_comparison, write_report

    with joined(settings.device) as prints:
        console = make_console(quiet=not prints)
        runs = len(settings.routers) * settings.seeds
        names = ", ".join(settings.routers)
        say(console, f"{runs} runs of {settings.steps} steps ({names}); records go to {out}")
        with make_progress(console) as progress:
            rows = compare(settings, out, observer=progress)
        if prints:
            print_results(console, rows, headline(read_comparison(out)))
            print_paths(console, write_report(out), figure_paths(out))


def _preset(arguments: list[str]) -> str:
    """The preset named by ``--preset``, found before parsing: it is the default of all other options.

    Without one, images ask for the vision preset.
    """
    preset = "vision" if any(word.split("=")[0] == "--images" for word in arguments) else "quick"
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word == "--preset":
            preset = following
        elif word.startswith("--preset="):
            preset = word.removeprefix("--preset=")
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no preset {preset!r} for --preset.{hint} Presets: {', '.join(PRESETS)}.")
    return preset
