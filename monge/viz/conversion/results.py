"""The rows of the table: runs that differ in their seed alone become one result."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from monge.viz.columns import Row
from monge.viz.conversion.runs import ORACLE, Run
from monge.viz.spread import Sample

CHANCE = ("seed", "threads")  # settings that do not make another experiment
PLACES = ("model", "against", "batch", "threads")  # of an evaluation, likewise
MEASURED = (
    "ffn_active", "active", "steps", "perplexity", "perplexity_dense", "ratio", "kl", "agreement", "cosine",
    "seconds",
)  # fmt: skip
SPREAD = ("ratio", "kl", "cosine")


@dataclass(frozen=True)
class Result:
    """One row: a method with its settings, over the seeds that were run.

    Attributes:
        name: the method, what was done to it after a comma. Results of one name at different active shares
            are one line of the plot.
        runs: one per seed.
        row: means over them, ``*_std`` where there are several; None for what was not measured.
    """

    name: str
    runs: tuple[Run, ...]
    row: Row

    @property
    def sample(self) -> Sample | None:
        """Of the logarithm of the ratio to the dense perplexity, which is the cross-entropy lost in nats."""
        ratios = [_quality(run.quality())["ratio"] for run in self.runs]
        lost = [math.log(ratio) for ratio in ratios if ratio]
        return Sample(statistics.fmean(lost), _deviation(lost), len(lost)) if lost else None


def gather_results(runs: Sequence[Run]) -> list[Result]:
    """The result of the first run, then the others by active share and name."""
    groups: dict[tuple[str, int], list[Run]] = {}
    seen: Counter[tuple[str, Any]] = Counter()
    for run in runs:
        settings, seed = _settings(run), run.method_settings.get("seed")
        groups.setdefault((settings, seen[settings, seed]), []).append(run)
        seen[settings, seed] += 1  # a run that was repeated is no further seed
    members = list(groups.values())
    first, *others = (
        Result(name, tuple(group), _means([_figures(run) for run in group]))
        for name, group in zip(_names([group[0] for group in members]), members, strict=True)
    )
    return [first, *sorted(others, key=lambda result: (-(result.row["ffn_active"] or 0.0), result.name))]


def oracle_row(run: Run) -> Row | None:
    """The row of the best neurons of every token, where the run measured them."""
    quality = run.quality(ORACLE)
    if not quality:
        return None
    figures = _figures(run)
    return _means([{"ffn_active": figures["ffn_active"]} | _quality(quality)])


def dense_row(run: Run) -> Row:
    """The row of the dense model, by its own figures on the text of the run."""
    perplexity, cosine = run.quality().get("perplexity_dense"), "cosine" in run.quality()
    exact: Row = {
        "ffn_active": 1.0,
        "active": 1.0,
        "perplexity": perplexity,
        "cosine": 1.0 if cosine else None,
    }
    if perplexity is not None:
        exact |= {"ratio": 1.0, "kl": 0.0, "agreement": 1.0}
    return _means([exact])


def _figures(run: Run) -> Row:
    """What the table shows of a single run."""
    plan, summary = run.plan, run.summary
    cost = {row.get("model"): row for row in run.of("cost")}
    converted, dense = cost.get("converted", {}), cost.get("dense", {})
    active = _first(summary.get("params_active"), converted.get("params_active"), plan.get("params_active"))
    total = _first(dense.get("params_total"), plan.get("params_dense"))
    own = run.command == "convert"
    return {
        "experts": _experts(plan),
        "ffn_active": _first(summary.get("ffn_active"), converted.get("ffn_active"), plan.get("ffn_active")),
        "active": active / total if active and total else None,
        "steps": run.made_by.get("finetune_steps", 0) if run.made_by else None,
        "seconds": summary.get("seconds") if own else None,
        **_quality(run.quality()),
    }


def _quality(row: Row) -> Row:
    figures = {
        name: row.get(name) for name in ("perplexity", "perplexity_dense", "kl", "agreement", "cosine")
    }
    now, before = figures["perplexity"], figures["perplexity_dense"]
    return figures | {"ratio": now / before if now is not None and before else None}


def _experts(plan: Row) -> str | None:
    """'8 of 24', the routed experts; None without a plan, empty for a narrower dense model."""
    if not plan:
        return None
    _, groups, active, shared = plan["shape"]
    return "" if plan.get("method") == "static" else f"{active - shared} of {groups - shared}"


def _means(rows: list[Row]) -> Row:
    mean: Row = {"seeds": len(rows), "experts": rows[0].get("experts")}
    for name in MEASURED:
        values = [row[name] for row in rows if row.get(name) is not None]
        mean[name] = statistics.fmean(values) if values else None
        if name in SPREAD:
            mean[f"{name}_std"] = _deviation(values)
    return mean


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _names(runs: Sequence[Run]) -> list[str]:
    """Method and fine-tuning; where that fits several results of one share, what else tells them apart."""
    mixed = len({run.command for run in runs}) > 1
    names = [_short_name(run) + (", eval" if mixed and run.command == "eval" else "") for run in runs]
    full = []
    for run, name in zip(runs, names, strict=True):
        alike = [other for other, known in zip(runs, names, strict=True) if known == name]
        shares = [other.method_settings.get("ffn_active") for other in alike]
        if len(set(map(str, shares))) < len(shares):
            name = ", ".join([name, *_differences(run, alike)])
        full.append(name)
    places = [(name, run.method_settings.get("ffn_active")) for name, run in zip(full, runs, strict=True)]
    return [
        f"{name}, {run.folder.name}" if places.count(place) > 1 else name
        for name, run, place in zip(full, runs, places, strict=True)
    ]


def _short_name(run: Run) -> str:
    settings = run.method_settings
    parts = [str(settings.get("method") or run.model or run.folder.name)]
    if settings.get("minutes"):
        parts.append("fine-tuned")
    if run.command == "eval" and run.settings.get("dtype", "float32") != "float32":
        parts.append(str(run.settings["dtype"]))
    return ", ".join(parts)


def _differences(run: Run, alike: Iterable[Run]) -> list[str]:
    """The settings that are not the same in all of them, as they are here."""
    settings = run.method_settings
    others = [other.method_settings for other in alike]
    return [
        f"{name} {_written(settings[name])}"
        for name in settings
        if name not in (*CHANCE, "ffn_active") and any(other.get(name) != settings[name] for other in others)
    ]


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(run: Run) -> str:
    """What two runs share if they differ in chance alone."""
    method = {name: value for name, value in run.method_settings.items() if name not in CHANCE}
    own = {name: value for name, value in run.settings.items() if name not in PLACES}
    settings = [method or str(run.folder), own if run.command == "eval" else {}]
    return json.dumps([run.command, *settings], sort_keys=True)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
