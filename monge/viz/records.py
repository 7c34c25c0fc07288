"""What a comparison left on disk, read without trusting it to be complete.

A run that was interrupted has no summary, perhaps half a last line, and after a resumption some lines twice;
all of that is normal here. Shapes: S seeds, N recorded steps, L layers, E experts.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monge.viz.reading import Record, read_config, read_lines, read_summary

DENSE = "dense"


@dataclass(frozen=True)
class Comparison:
    """The records of one output folder of `monge compare`.

    Attributes:
        config: the content of ``config.json``.
        records: the lines of ``records.jsonl`` by kind ("train", "load", "val", "eval"), each sorted by step,
            the last writer of a (router, seed, step, layer) winning. Only of the routers and seeds asked for
            last: the folder may hold more.
        rows: one summary per router, from ``summary.json`` or, where that is missing, from the finished runs.
    """

    config: Record
    records: dict[str, list[Record]]
    rows: list[Record]

    @property
    def settings(self) -> Record:
        """The fields of the configuration."""
        return self.config.get("config", {})

    @property
    def routers(self) -> list[str]:
        """Every router with at least one record, in the order asked for."""
        seen = dict.fromkeys(r["router"] for kind in ("train", "eval") for r in self.records.get(kind, []))
        asked = [name for name in self.settings.get("routers", []) if name in seen]
        return asked + [name for name in seen if name not in asked]

    @property
    def reference(self) -> str | None:
        """The router that differences are taken to: topk where there is one, else the first with experts."""
        return reference_of(self.routers)

    @property
    def of_images(self) -> bool:
        """Whether images were classified, not text modelled."""
        return "images" in self.config.get("data", {})

    @property
    def unit(self) -> str:
        """Of a loss."""
        return f"nats per {'image' if self.of_images else 'token'}"

    @property
    def synthetic(self) -> str:
        """How the experts were made unequal on purpose, or nothing where they were not."""
        start, experts = self.settings.get("router_bias") or 0.0, int(self.settings.get("experts", 0))
        if not start:
            return ""
        favoured = max(1, experts // 4)
        return (
            f"Synthetic: a learnable router bias starts at {start:+g} on {favoured} of the {experts} "
            "experts of a layer."
        )

    @property
    def planned_runs(self) -> int:
        """Routers times seeds asked for."""
        return len(self.settings.get("routers", [])) * int(self.settings.get("seeds", 0))

    @property
    def finished_runs(self) -> int:
        """Runs with a final evaluation."""
        return len({(r["router"], r["seed"]) for r in self.records.get("eval", [])})

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return self.finished_runs >= max(self.planned_runs, 1)

    @property
    def seeds(self) -> int:
        """The fewest seeds any reported router has, 0 when none finished."""
        return min((int(row["seeds"]) for row in self.rows), default=0)

    def of(self, kind: str, router: str) -> list[Record]:
        """The records of one kind and router."""
        return [r for r in self.records.get(kind, []) if r["router"] == router]

    def curve(self, kind: str, router: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) steps and (S, N) values of ``field``, over the seeds that got furthest.

        A seed that is still under way would bend the mean where it ends, so it is left out as soon as another
        seed got further. Both arrays are empty where nothing was recorded.
        """
        by_seed: dict[int, dict[int, float]] = {}
        for r in self.of(kind, router):
            value = r.get(field)
            if value is not None and np.isfinite(value):
                by_seed.setdefault(r["seed"], {})[r["step"]] = float(value)
        if not by_seed:
            return np.zeros(0), np.zeros((0, 0))
        last = max(max(points) for points in by_seed.values())
        whole = [by_seed[seed] for seed in sorted(by_seed) if max(by_seed[seed]) == last]
        steps = sorted(set.intersection(*(set(points) for points in whole)))
        return np.array(steps), np.array([[points[s] for s in steps] for points in whole])

    def loads(self, router: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) steps and (N, L, E) load shares of the first seed, empty where none were recorded."""
        records = self.of("load", router)
        first = min((r["seed"] for r in records), default=None)
        table: dict[int, dict[int, list[float]]] = {}
        for r in records:
            if r["seed"] == first:
                table.setdefault(r["step"], {})[r["layer"]] = r["loads"]
        layers = max((len(row) for row in table.values()), default=0)
        steps = sorted(step for step, row in table.items() if len(row) == layers)
        if not steps:
            return np.zeros(0), np.zeros((0, 0, 0))
        return np.array(steps), np.array([[table[s][layer] for layer in sorted(table[s])] for s in steps])


def reference_of(routers: list[str]) -> str | None:
    """topk where it is among them, else the first with experts."""
    sparse = [name for name in routers if name != DENSE]
    return "topk" if "topk" in sparse else sparse[0] if sparse else None


def read_comparison(out: Path) -> Comparison:
    """Read the folder that `monge compare` wrote.

    Args:
        out: the folder with ``config.json`` and ``records.jsonl``; ``summary.json`` may be missing.

    Raises:
        FileNotFoundError: there is no ``config.json`` in ``out``.
        ValueError: ``config.json`` is not a JSON object.
    """
    config = read_config(out)
    records, rows = _latest(_asked(read_lines(out), config.get("config", {}))), read_summary(out)
    return Comparison(config, records, rows if isinstance(rows, list) else _summarise(records))


def _asked(lines: list[Record], settings: Record) -> list[Record]:
    """The lines of the routers and seeds that the settings name, all where they name none."""
    routers, seeds = settings.get("routers"), settings.get("seeds")
    return [
        line
        for line in lines
        if (routers is None or line.get("router") in routers)
        and (seeds is None or line.get("seed", 0) < seeds)
    ]


def _latest(lines: list[Record]) -> dict[str, list[Record]]:
    """By kind and in the order of steps; of the records of one step, the last one written."""
    latest: dict[tuple[Any, ...], Record] = {}
    for record in lines:
        if {"router", "seed", "step"} <= record.keys():
            key = tuple(record.get(name) for name in ("kind", "router", "seed", "step", "layer"))
            latest[key] = record
    by_kind: dict[str, list[Record]] = {}
    for record in sorted(latest.values(), key=lambda r: r["step"]):
        by_kind.setdefault(record["kind"], []).append(record)
    return by_kind


def _summarise(records: dict[str, list[Record]]) -> list[Record]:
    """The rows of an unfinished comparison: means over the runs that did finish, and no paired
    differences."""
    by_router: dict[str, list[Record]] = {}
    for record in records.get("eval", []):
        by_router.setdefault(record["router"], []).append(record)
    rows = []
    for router, runs in by_router.items():
        losses = [r["val_loss"] for r in runs]
        row: Record = {
            "router": router,
            "seeds": len(runs),
            "val_loss_mean": statistics.fmean(losses),
            "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
            "val_loss_own_mean": _mean(runs, "val_loss_own"),
            "steps": runs[-1]["step"],
        }
        for name in (
            "train_max_violation", "max_violation", "dead_experts", "leak", "ms_route", "ms_step", "wall_s",
            "ot_steps", "params_total", "params_active", "peak_memory_bytes", "leak_kl", "specialisation",
            "bias_gap", "bias_gradient", "val_loss_cf1", "val_loss_cf125", "val_loss_own_cf1",
            "val_loss_own_cf125", "accuracy", "accuracy_corrupted", "corrupted", "val_loss_by_domain",
        ):  # fmt: skip
            row[name] = _mean(runs, name)
        rows.append(row)
    return rows


def _mean(runs: list[Record], name: str) -> Any:
    return _mean_of([r[name] for r in runs if r.get(name) is not None])


def _mean_of(values: list[Any]) -> Any:
    """Of numbers, or of dictionaries entry by entry."""
    if values and isinstance(values[0], dict):
        return {key: _mean_of([v[key] for v in values if key in v]) for key in values[0]}
    return statistics.fmean(values) if values else None
