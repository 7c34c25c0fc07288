"""`monge demo`: both halves of the library in minutes, on a real pretrained model and real text.

convert SmolLM2 --> beside random split and static pruning --> write with both --> quick router comparison
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from monge.cli.compare import compare_and_report
from monge.cli.observing import make_stage_progress
from monge.cli.terminal import make_console, say
from monge.conversion.config import ConvertConfig
from monge.lab.presets import PRESETS

if TYPE_CHECKING:
    from monge.conversion import ConvertResult
    from monge.conversion.source import Source

ROUTERS = ("dense", "topk", "ssr", "maxscore", "prices")
METHODS = ("ot_lloyd", "static", "random")
CONVERSION = ConvertConfig(ffn_active=0.5, tokens=8_192, eval_tokens=256)
EVAL_TOKENS = 4_096  # for all methods at once, the dense model being the same
PROMPTS = (
    "My fellow citizens, the state of our union is",
    "Water is made of",
)
WRITTEN = 32  # tokens after each prompt
QUICK = PRESETS["quick"]
COMPARISON = replace(QUICK, routers=ROUTERS, seeds=1, steps=QUICK.steps // 3)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Convert SmolLM2-135M to a Mixture of Experts, then train small models with experts, all on real text.

    Half of the FFN neurons stay active; random division and static pruning stand beside the conversion, all
    refitted in the same way. Then a dense model and four with experts are trained, routed by top-k, SSR,
    MaxScore and prices. One seed each, a third as long as in the quick preset: a demonstration, no ranking.
    `monge convert` and `monge compare` have every option.
    """

    out: Path = Path("runs/demo")
    """Folder for convert/ and compare/, with records, figures and report.html; created if missing."""
    debug: bool = False  # `main` has read it already; declared for the help
    """Show the traceback of an error."""


def run(arguments: list[str]) -> None:
    """Parse, convert, train, report."""
    parsed = tyro.cli(Arguments, args=arguments, prog="monge demo", config=(tyro.conf.FlagCreatePairsOff,))
    _convert(parsed.out / "convert")
    compare_and_report(COMPARISON, parsed.out / "compare")


def _convert(out: Path) -> None:
    """The conversion beside its baselines, then a few sentences of the dense and the converted model."""
    from monge.conversion import convert
    from monge.conversion.generation import generate_text
    from monge.conversion.source import default_model, open_model

    console = make_console()
    source = default_model()
    results: dict[str, ConvertResult] = {}
    for method in METHODS:
        say(console, f"SmolLM2 by {method}: {CONVERSION.ffn_active:.0%} of the FFN neurons active")
        with make_stage_progress(console) as progress:
            settings = replace(CONVERSION, method=method)
            results[method] = convert(source, settings, out=out / method, observer=progress)
    dense = open_model(source)
    _compare(console, dense, results)
    for prompt in PROMPTS:
        for name, model in (("dense", dense.model), ("converted", results[METHODS[0]].model)):
            text = generate_text(model, dense.tokenizer, prompt, tokens=WRITTEN)
            say(console, f"{name:<10}{prompt}{text.rstrip()}".replace("\n", " "))


def _compare(console: Console, dense: Source, results: dict[str, ConvertResult]) -> None:
    """All conversions beside the dense model, on text that none of them has seen."""
    from monge.conversion.corpus import open_corpus
    from monge.conversion.evaluation.quality import predictor, sum_predictors

    chunks_NL = open_corpus(dense.tokenizer, replace(CONVERSION, eval_tokens=EVAL_TOKENS)).evaluation_NL
    with make_stage_progress(console) as progress:
        progress.stage("evaluate", len(chunks_NL))
        predictors = [predictor(result.model) for result in results.values()]
        totals = sum_predictors(dense.model, predictors, chunks_NL, observer=progress)
    table = Table("method", "perplexity", "of dense", "KL", "same choice", "active", box=box.SIMPLE_HEAD)
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    table.add_row("dense", f"{totals[0].means().perplexity_dense:.2f}", "1.00x", "0", "100%", "100%")
    for (method, result), total in zip(results.items(), totals):
        quality, summary = total.means(), result.summary
        table.add_row(
            method,
            f"{quality.perplexity:.2f}",
            f"{quality.perplexity / quality.perplexity_dense:.2f}x",
            f"{quality.kl:.3f}",
            f"{quality.agreement:.0%}",
            f"{summary['params_active'] / parameters:.0%}",
        )
    console.print(table)
