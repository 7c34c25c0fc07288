"""The columns of the tables: one title, meaning and format for the report and for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from monge.viz.names import label
from monge.viz.numbers import (
    MISSING,
    count,
    difference,
    increase,
    loss,
    memory,
    milliseconds,
    percent,
    ratio,
    small,
)
from monge.viz.records import reference_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: how it is called, what it means, and how a row of ``summary.json`` fills it."""

    title: str
    meaning: str
    cell: Callable[[Row], str]
    brief: str = ""  # a narrower title, for the terminal


_INTERVAL = (
    "The paired difference to {0}, seed by seed (a seed's runs share initial weights and data), with its "
    "95 % confidence interval (Student's t). Where the interval holds 0, the two are not ranked; one in "
    "twenty intervals misses by chance."
)

LOSS = Column(
    "val. loss",
    "Mean cross-entropy on held-out data in nats per token or image, lower is better, ± one standard "
    "deviation over seeds. Every token is routed on its own, as in generation: with the stored prices or "
    "biases where the router has them, by plain top-k for ssr and maxscore. Nothing is dropped.",
    lambda row: loss(row.get("val_loss_mean"), row.get("val_loss_std")),
)
ACCURACY = Column(
    "accuracy",
    "Share of the held-out images whose class is the model's first choice, ± one standard deviation over "
    "seeds.",
    lambda row: _share(row.get("accuracy"), row.get("accuracy_std")),
)
OTHERS: tuple[Column, ...] = (
    Column(
        "corrupted",
        "Accuracy on corrupted images, the mean over all kinds and strengths.",
        lambda row: _share(row.get("accuracy_corrupted"), row.get("accuracy_corrupted_std")),
    ),
    Column(
        "own routing",
        "The validation loss routed as the method itself does: maxscore with its stored prices, other "
        "routers that look at the whole batch, and layers with a capacity, as in training, the rest as "
        "before.",
        lambda row: loss(row.get("val_loss_own_mean")),
        brief="own",
    ),
    Column(
        "imbalance, train",
        "Largest load / mean load - 1 over the experts of a layer, mean over layers and over the last "
        "quarter of training: 0 is perfect balance, 1 means that the busiest expert gets twice its share.",
        lambda row: ratio(row.get("train_max_violation")),
        brief="imbal. train",
    ),
    Column(
        "imbalance, val.",
        "The same over the whole validation set: what a deployed model would see.",
        lambda row: ratio(row.get("max_violation")),
        brief="imbal. val.",
    ),
    Column(
        "dead",
        "Experts, over all layers, that no validation token reaches.",
        lambda row: count(row.get("dead_experts")),
    ),
    Column(
        "leak",
        "Share of the routes in the first half of a sequence (of images: of a batch) that change when its "
        "second half is replaced, in training. Above 0, the router looks at tokens that generation has not "
        "produced yet.",
        lambda row: percent(row.get("leak")),
    ),
    Column(
        "leak, KL",
        "What that does to the output: KL divergence, in nats, between the predictions of the first half "
        "before and after the second half is replaced.",
        lambda row: small(row.get("leak_kl")),
    ),
    Column(
        "specialisation",
        "Mutual information of expert and domain (kind of text, or class of image) in nats, mean over "
        "layers: 0 where an expert tells nothing of the domain.",
        lambda row: small(row.get("specialisation")),
        brief="special.",
    ),
    Column(
        "bias left",
        "Mean router bias of the experts that were favoured at the start less that of the others, after "
        "training: how much of the synthetic imbalance the logits still carry.",
        lambda row: increase(row.get("bias_gap")),
    ),
    Column(
        "bias gradient",
        "Norm of the gradient of the training loss to the router bias, routed as in training (ssr: a "
        "transport step), mean over layers. Sinkhorn absorbs a constant per expert, so there it is 0 but "
        "for rounding and unfinished iterations, and the bias cannot be unlearned.",
        lambda row: small(row.get("bias_gradient")),
    ),
    Column(
        "OT steps",
        "Routings of a whole run, over its steps and layers, that solved an optimal-transport problem, "
        "for the router that selects them (ssr).",
        lambda row: count(row.get("ot_steps")),
    ),
    Column(
        "ms / step",
        "Milliseconds of wall time per training step, the median.",
        lambda row: milliseconds(row.get("ms_step")),
        brief="ms step",
    ),
    Column(
        "ms routing",
        "Milliseconds of routing per layer, forward as in training.",
        lambda row: milliseconds(row.get("ms_route")),
        brief="ms route",
    ),
)


def _rise(over: str, under: str) -> Callable[[Row], str]:
    """A cell with the difference of two fields."""

    def cell(row: Row) -> str:
        values = row.get(over), row.get(under)
        return MISSING if None in values else increase(row[over] - row[under])

    return cell


CAPACITY: tuple[Column, ...] = tuple(
    Column(
        title,
        meaning,
        _rise(over, under),
    )
    for title, meaning, over, under in (
        (
            "capacity 1",
            "By how much the validation loss rises when an expert takes at most an equal share of a "
            "batch's slots (capacity factor 1) and the rest is dropped, as with static shapes.",
            "val_loss_cf1",
            "val_loss_mean",
        ),
        ("capacity 1.25", "The same with a quarter more room.", "val_loss_cf125", "val_loss_mean"),
        (
            "own, capacity 1",
            "The same for the method's own routing (see there): maxscore with its prices.",
            "val_loss_own_cf1",
            "val_loss_own_mean",
        ),
        (
            "own, capacity 1.25",
            "The same with a quarter more room.",
            "val_loss_own_cf125",
            "val_loss_own_mean",
        ),
    )
)

MEMORY = Column(
    "peak memory",
    "The largest resident memory of the process while the model trained, libraries and data included; on an "
    "accelerator, what was allocated there.",
    lambda row: memory(row.get("peak_memory_bytes")),
)


def columns_of(rows: list[Row]) -> list[Column]:
    """The columns of the main table that have something to show, differences to the reference among them."""
    reference = reference_of([row["router"] for row in rows])
    columns = (LOSS, *_minus(reference, "minus"), ACCURACY, *_minus(reference, "accuracy_minus"), *OTHERS)
    return [column for column in columns if any(column.cell(row) != MISSING for row in rows)]


def _minus(reference: str | None, field: str) -> list[Column]:
    """The paired difference to the reference, of the loss or of the accuracy."""
    if reference is None:
        return []
    name = label(reference)
    if field == "minus":
        return [
            Column(
                f"minus {name}",
                _INTERVAL.format(name),
                lambda row: difference(_interval(row, field, reference)),
            )
        ]
    return [
        Column(
            f"accuracy minus {name}",
            "The same of the accuracy, in percentage points.",
            lambda row: _points(_interval(row, field, reference)),
        )
    ]


def _interval(row: Row, field: str, reference: str) -> dict[str, float] | None:
    return (row.get(field) or {}).get(reference)


def _share(value: float | None, spread: float | None) -> str:
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if spread is None else f"{100 * value:.1f} ± {100 * spread:.1f} %"


def _points(interval: dict[str, float] | None) -> str:
    return difference(interval and {name: 100 * value for name, value in interval.items()}, decimals=1)
