"""What `monge bench` left on disk, as tables and in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from monge.viz.numbers import memory, ratio
from monge.viz.reading import Record, read_config, read_lines, read_summary

DENSE, MONGE = "dense", "monge"
Rows = list[list[str]]


@dataclass(frozen=True)
class SpeedRun:
    """The output folder of a run: ``config.json``, a record a case, ``summary.json``."""

    about: Record
    rows: list[Record]
    complete: bool

    def of(self, kind: str) -> list[Record]:
        """The records of inference, training or model."""
        return [row for row in self.rows if row["kind"] == kind]


def read_speed(out: Path) -> SpeedRun:
    """Read the folder of `monge bench`.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it is of another command.
    """
    about = read_config(out)
    if about.get("command") != "bench":
        raise ValueError(f"{out} is of `monge {about.get('command')}`, not of `monge bench`.")
    return SpeedRun(about, read_lines(out), bool(read_summary(out)))


def share(row: Record) -> str:
    """The part of the experts that a token uses."""
    return f"{100 * row['active'] / row['experts']:.0f} %"


def over_the_best(row: Record) -> float:
    """Monge's speed over that of the best of transformers' paths."""
    figures = row["times_dense"]
    return figures[MONGE] / max(value for name, value in figures.items() if name not in (DENSE, MONGE))


def headline(run: SpeedRun) -> str:
    """What matters most: a sentence for each kind of case that was measured."""
    told = [*_inference_told(run), *_training_told(run), *_models_told(run)]
    return " ".join(told) or "Nothing has been measured yet."


def _inference_told(run: SpeedRun) -> list[str]:
    if not (rows := run.of("inference")):
        return []
    told = [
        f"{row['times_dense'][MONGE]:.1f} times at {row['phase']} ({share(row)} active)"
        for row in rows
        if row["dtype"] == rows[0]["dtype"]
    ]
    least = min(rows, key=over_the_best)
    return [
        f"In {rows[0]['dtype']} Monge's experts reach these multiples of the dense FFN's speed: "
        f"{', '.join(told)}; and of the best of transformers' paths {over_the_best(least):.2f} in the least "
        f"favourable case ({least['phase']}, {share(least)}, {least['dtype']})."
    ]


def _training_told(run: SpeedRun) -> list[str]:
    return [
        f"A training step of {row['layer']} in {row['dtype']} reaches {row['flops_of_dense'][MONGE]:.2f} of "
        "the dense FFN's FLOP/s."
        for row in run.of("training")
    ]


def _models_told(run: SpeedRun) -> list[str]:
    rows = {row["name"]: row for row in run.of("model")}
    if MONGE not in rows:
        return []
    decode, prefill = (rows[MONGE][f"{phase}_tokens_per_s"] for phase in ("decode", "prefill"))
    if DENSE not in rows:
        return [f"The model as a whole writes {decode:.1f} tokens a second and reads {prefill:.1f}."]
    base = rows[DENSE]
    return [
        f"The model as a whole writes {decode / base['decode_tokens_per_s']:.2f} and reads "
        f"{prefill / base['prefill_tokens_per_s']:.2f} times as fast as the dense one."
    ]


def tables(run: SpeedRun) -> list[tuple[str, list[str], Rows]]:
    """Title, column names and cells of a table for each kind of case that was measured."""
    found = [
        ("Forward: times faster than the dense FFN", *_inference(run)),
        ("Training step: FLOP/s as a share of the dense FFN's", *_training(run)),
        ("Whole model: tokens per second", *_models(run)),
    ]
    return [table for table in found if table[2]]


def _inference(run: SpeedRun) -> tuple[list[str], Rows]:
    rows = run.of("inference")
    names = _names(rows, "times_dense")
    columns = ["case", "path", *names, "over the best"]
    return columns, [
        [
            f"{row['phase']}, {share(row)}, {row['dtype']}",
            row["path"],
            *(ratio(row["times_dense"].get(name)) for name in names),
            ratio(over_the_best(row)),
        ]
        for row in rows
    ]


def _training(run: SpeedRun) -> tuple[list[str], Rows]:
    rows = run.of("training")
    names = _names(rows, "flops_of_dense")
    columns = ["case", *names, f"memory, {MONGE}", "memory, grouped_mm"]
    return columns, [
        [
            f"{row['layer']}, {row['dtype']}",
            *(ratio(row["flops_of_dense"].get(name)) for name in names),
            *(memory(row["peak_bytes"].get(name)) for name in (MONGE, "grouped_mm")),
        ]
        for row in rows
    ]


def _models(run: SpeedRun) -> tuple[list[str], Rows]:
    rows = run.of("model")
    base = next((row for row in rows if row["name"] == DENSE), None)

    def cells(row: Record, name: str) -> list[str]:
        value = row[f"{name}_tokens_per_s"]
        return [f"{value:.1f}", ratio(value / base[f"{name}_tokens_per_s"] if base else None)]

    columns = ["model", "prefill", "of dense", "decode", "of dense"]
    return columns, [[row["name"], *cells(row, "prefill"), *cells(row, "decode")] for row in rows]


def _names(rows: list[Record], figures: str) -> list[str]:
    """All candidates but the dense FFN, Monge's first."""
    known = {name: None for row in rows for name in row[figures]}
    return [MONGE, *(name for name in known if name not in (MONGE, DENSE))] if rows else []
