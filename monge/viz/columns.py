"""The columns of a results table: one title, meaning and format for the report and for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from monge.viz.numbers import count, loss, milliseconds, percent, ratio

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: how it is called, what it means, and how a row of ``summary.json`` fills it."""

    title: str
    meaning: str
    cell: Callable[[Row], str]
    brief: str = ""  # a narrower title, for the terminal


COLUMNS: tuple[Column, ...] = (
    Column(
        "val. loss",
        "Mean cross-entropy on held-out text in nats per token, lower is better, ± one standard deviation "
        "over seeds. Every token is routed on its own, as in generation: with the stored prices or biases "
        "where the router has them, by plain top-k for ssr and maxscore.",
        lambda row: loss(row.get("val_loss_mean"), row.get("val_loss_std")),
    ),
    Column(
        "own routing",
        "The same loss routed as the method itself does: maxscore with its stored prices, other routers that "
        "look at the whole batch as in training, the rest as before.",
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
        "Share of the routes in the first half of a sequence that change when its second half is replaced, "
        "in training. Above 0, the router looks at tokens that generation has not produced yet.",
        lambda row: percent(row.get("leak")),
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
