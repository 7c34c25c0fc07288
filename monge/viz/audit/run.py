"""What `monge audit` left on disk, and what it allows to be said in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from monge.viz.numbers import percent
from monge.viz.reading import Record, read_config, read_lines, read_summary

CHANCE = 1e-3  # share of changed slots up to which rounding is the likely cause


@dataclass(frozen=True)
class AuditRun:
    """The output folder of an audit: ``config.json``, a record per layer, ``summary.json``."""

    about: Record
    layers: list[Record]
    summary: Record

    @property
    def model(self) -> str:
        """Its name."""
        return str(self.about.get("model", {}).get("name", "A model"))

    @property
    def complete(self) -> bool:
        """Whether the audit came to its end."""
        return bool(self.summary and self.layers)


def read_audit(out: Path) -> AuditRun:
    """Read the folder of an audit.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it is of another command.
    """
    about = read_config(out)
    if about.get("command") != "audit":
        raise ValueError(f"{out} is of `monge {about.get('command')}`, not of an audit.")
    layers = [row for row in read_lines(out) if row["kind"] == "audit_layer"]
    summary = read_summary(out)
    return AuditRun(about, layers, summary if isinstance(summary, dict) else {})


def headline(run: AuditRun) -> str:
    """The finding that matters most."""
    if not run.complete:
        return "The audit has not finished."
    found = run.summary
    dead, experts = found["dead_experts"], found["experts"]
    who = f"{dead} of {experts} experts are dead" if dead else f"All {experts} experts are in use"
    worst = max(run.layers, key=lambda row: row["max_violation"])
    dropped = percent(found["drops"][min(found["drops"], key=float)])
    return (
        f"{who}; in the least balanced layer ({worst['layer']}) the busiest takes "
        f"{1 + worst['max_violation']:.1f} times its share, and a static capacity of "
        f"{min(found['drops'], key=float)} times an equal share would drop {dropped} of all slots."
    )


def findings(run: AuditRun) -> list[str]:
    """One sentence per question that was asked."""
    if not run.complete:
        return []
    found = run.summary
    said = [
        f"{found['duplicate_pairs']} pairs of experts give nearly the same output on the same tokens."
        if found["duplicate_pairs"]
        else "No two experts of a layer give nearly the same output.",
        _specialisation(found),
        _precision(found),
        _dependence(found),
        _neighbours(found),
        _stock(found),
    ]
    return [sentence for sentence in said if sentence]


def _specialisation(found: Record) -> str:
    if found["information"] is None:
        return ""
    share = found["information"] / math.log(len(found["domains"]))
    chance = found["information_chance"] / math.log(len(found["domains"]))
    return (
        f"An expert tells {percent(share)} of what there is to know about the text's domain; "
        f"{percent(chance)} would be chance."
    )


def _precision(found: Record) -> str:
    if found["flips"] is None:
        return ""
    loss = found["loss_precision"] - found["loss_checked"]
    return (
        f"In {found['precision']} {percent(found['flips'])} of the slots go to another expert, and the loss "
        f"changes by {loss:+.4f} nats."
    )


def _dependence(found: Record) -> str:
    here = max(found["batch_dependence"], found["leak"])
    if here > CHANCE:
        text = (
            f"In evaluation {percent(found['batch_dependence'])} of the slots depend on the other sequences "
            f"of the batch, and {percent(found['leak'])} on later tokens: generation routes otherwise."
        )
    else:
        text = "In evaluation no route depends on the batch or on later tokens"
        text += "." if here == 0 else f", beyond rounding ({percent(here)} of the slots)."
    if found["leak_training"] == found["batch_dependence_training"] == 0:
        text += " Nor in training."
    elif found["leak_training"] is not None:
        text += (
            f" In training {percent(found['batch_dependence_training'])} depend on the batch and "
            f"{percent(found['leak_training'])} on later tokens."
        )
    return text


def _neighbours(found: Record) -> str:
    losses, loss = found["losses"], found["loss"]
    parts = [
        f"one expert {word} per token {losses[key] - loss:+.4f}"
        for key, word in (("-1", "less"), ("+1", "more"))
        if key in losses
    ]
    return f"Loss {loss:.4f} nats per token; with {' and '.join(parts)}." if parts else ""


def _stock(found: Record) -> str:
    if found["loss_stock"] is None:
        return ""
    cost = found["loss_stock"] - found["loss_checked"]
    return f"Routed by transformers alone, without Monge, the loss changes by {cost:+.4f} nats."
