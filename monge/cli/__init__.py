"""The command line: `monge COMMAND [OPTIONS]`.

    COMMANDS --> one module per command, imported when it is called --> exit status

A command is a module with ``run(arguments) -> None``; adding one is one entry in `COMMANDS`. Commands raise;
only `main` turns what they raise into a paragraph and a status: 0 done, 1 failed or interrupted, 2 bad usage.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from monge.cli.terminal import complain


@dataclass(frozen=True)
class Command:
    """Where a command lives, what it does in a line, and whether repeating it resumes it."""

    module: str
    summary: str
    resumes: bool = False


COMMANDS = {
    "demo": Command(
        "monge.cli.demo", "see the routers train side by side on real text, in minutes", resumes=True
    ),
    "compare": Command(
        "monge.cli.compare", "train models that differ in their router, and compare them", resumes=True
    ),
    "convert": Command(
        "monge.cli.convert", "turn a dense checkpoint into a Mixture of Experts", resumes=True
    ),
    "eval": Command("monge.cli.eval", "measure what a converted model kept, and what it saves", resumes=True),
    "audit": Command("monge.cli.audit", "see what the routing of any Mixture of Experts does"),
    "generate": Command("monge.cli.generate", "write text with a dense or a converted model"),
    "bench": Command(
        "monge.cli.bench", "time the experts and whole models beside the alternatives", resumes=True
    ),
    "report": Command("monge.cli.report", "draw the figures and the report of a run again"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 failed or interrupted, 2 bad usage.

    Args:
        argv: the words after ``monge``; those of the process when None.

    Examples:
        >>> from monge.cli import main
        >>> main(["--version"])
        monge 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # before or after the command
    words = [word for word in arguments if word != "--debug"]
    try:
        return _run(words)
    except SystemExit as stop:  # tyro has printed its help (0) or what was wrong (2)
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # the reader of our output has gone, as in `monge demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return _explain(error, words, debug)


def _run(words: list[str]) -> int:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if name == "--version":
        from monge import __version__

        print(f"monge {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no command {name!r}. {hint}Commands: {', '.join(COMMANDS)}.")
    importlib.import_module(COMMANDS[name].module).run(rest)
    return 0


def _overview() -> str:
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: monge COMMAND [OPTIONS]\n\nMixture-of-Experts by optimal transport.\n\n"
        f"commands:\n{commands}\n\noptions:\n"
        "  -h, --help  show this, or after a command all of its options\n"
        "  --version   print the version\n"
        "  --debug     show the traceback of an error"
    )


def _explain(error: BaseException, words: list[str], debug: bool) -> int:
    """One paragraph on stderr; the exit status."""
    command = COMMANDS.get(words[0]) if words else None
    program = f"monge {words[0]}" if command else "monge"
    if isinstance(error, KeyboardInterrupt):
        remedy = " The same command goes on from the last checkpoint." if command and command.resumes else ""
        complain(program, f"interrupted.{remedy}")
        return 1
    if isinstance(error, ValueError | FileNotFoundError):  # bad input, by the rule of this package
        complain(program, str(error))
        return 2
    text = str(error) or "no further message"
    if not isinstance(error, OSError | ImportError):
        text = f"{type(error).__name__}: {text}" + ("" if debug else " (--debug shows where)")
    complain(program, text)
    return 1
