"""`monge generate`: text from a dense or a converted model, as it is written."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Let a model go on from a prompt: a dense one, an export or a Monge checkpoint."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """The model: a folder, a .gguf file or a hub name."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """Text to go on from, or with --chat what you say to the model."""
    tokens: int = 64
    """Tokens to write at most; fewer where the model ends its text."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; more samples, from softmax(logits / temperature)."""
    device: str = "cpu"
    """Where to compute: a torch device such as cpu or cuda."""
    seed: int = 0
    """Seed of the sampling."""
    debug: bool = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, open, write: the text goes to stdout, how fast it came to stderr."""
    parsed = tyro.cli(
        Arguments, args=arguments, prog="monge generate", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("this needs transformers, not installed here: pip install 'monge[hf]'.")
    from monge.conversion.generation import generate_text
    from monge.conversion.opening import open_any
    from monge.workspace.machine import usable_device

    notes = Console(stderr=True, highlight=False)
    with notes.status(f"opening {parsed.model}"):
        source = open_any(parsed.model, device=usable_device(parsed.device))
    if not parsed.chat:
        print(parsed.prompt, end="", flush=True)
    began = time.perf_counter()
    text = generate_text(
        source.model,
        source.tokenizer,
        parsed.prompt,
        tokens=parsed.tokens,
        temperature=parsed.temperature,
        seed=parsed.seed,
        chat=parsed.chat,
        on_text=lambda piece: print(piece, end="", flush=True),
    )
    seconds = time.perf_counter() - began
    print()
    written = len(source.tokenizer(text, add_special_tokens=False)["input_ids"])
    notes.print(f"{source.name}: {written} tokens, {written / seconds:.1f} tokens/s", style="dim")
