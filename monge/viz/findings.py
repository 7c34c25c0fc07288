"""What the figures allow to be said, in sentences, and nothing beyond.

Two routers are ranked only where the gap between their means is larger than chance explains: a two-sided
t-test at the 1 % level, the standard deviation over seeds pooled over all routers. With one seed nothing is
ranked.
"""

from __future__ import annotations

import math

from monge.viz import spread
from monge.viz.columns import Row
from monge.viz.numbers import enumeration, loss, milliseconds, percent
from monge.viz.records import DENSE, Comparison

DEMONSTRATION = "A demonstration, no ranking."


def headline(comparison: Comparison) -> str:
    """One or two sentences on the validation losses."""
    rows = sorted(_finite(comparison), key=lambda row: row["val_loss_mean"])
    if not rows:
        return "No run has finished yet, so there is nothing to report."
    if len(rows) == 1:
        return f"{_name(rows[0])} ends at a validation loss of {_value(rows[0])}, the only model so far."
    if comparison.seeds < 2:
        low, high = loss(rows[0]["val_loss_mean"]), loss(rows[-1]["val_loss_mean"])
        seeds = "one seed" if all(row["seeds"] == 1 for row in rows) else "one seed of some"
        return (
            f"{DEMONSTRATION} The {len(rows)} models end between {low} and {high} nats per token, and with "
            f"{seeds} there is no spread that would tell a difference from chance."
        )
    tied, behind = _split(rows)
    if len(tied) == len(rows):
        return (
            f"No ranking: the spread over seeds does not separate {_list(tied)} "
            f"({loss(rows[0]['val_loss_mean'])} to {loss(rows[-1]['val_loss_mean'])} nats per token)."
        )
    if len(tied) == 1:
        first = f"{_name(tied[0])} has the lowest validation loss, {_value(tied[0])} nats per token"
    else:
        first = f"The spread over seeds does not separate {_list(tied)} at the lowest validation loss"
    gaps = [f"{_name(row)} by {row['val_loss_mean'] - rows[0]['val_loss_mean']:.3f}" for row in behind]
    return f"{first}; measurably behind: {enumeration(gaps)}."


def findings(comparison: Comparison) -> list[str]:
    """Further sentences, one per question: against dense, balance, dead experts, leak, cost of routing."""
    rows = _finite(comparison)
    sparse = [row for row in rows if row["router"] != DENSE]
    sentences = [
        _against_dense(rows, sparse, comparison.seeds),
        _balance(sparse),
        _leak(sparse),
        _cost(sparse, comparison.settings.get("layers")),
    ]
    return [sentence for sentence in sentences if sentence]


def separated(a: Row, b: Row, rows: list[Row]) -> bool:
    """Whether the losses of two routers differ by more than the spread over seeds explains (see above)."""
    return spread.separated(_sample(a), _sample(b), [_sample(row) for row in rows])


def _sample(row: Row) -> spread.Sample:
    return spread.Sample(row["val_loss_mean"], row.get("val_loss_std"), int(row["seeds"]))


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The routers that the lowest one is not separated from, itself included, and the others; rows ascend."""
    tied = [row for row in rows if row is rows[0] or not separated(rows[0], row, rows)]
    return tied, [row for row in rows if row not in tied]


_DOUBT = (" (within the spread over seeds)", " (not all of it beyond the spread over seeds)")


def _against_dense(rows: list[Row], sparse: list[Row], seeds: int) -> str:
    dense = next((row for row in rows if row["router"] == DENSE), None)
    if dense is None or not sparse:
        return ""
    gains = [dense["val_loss_mean"] - row["val_loss_mean"] for row in sparse]
    beyond = sum(separated(dense, row, rows) for row in sparse)
    doubt = " (one seed)" if seeds < 2 else _DOUBT[beyond > 0] if beyond < len(sparse) else ""
    subject = "Every model with experts ends" if len(sparse) > 1 else f"{_name(sparse[0])} ends"
    baseline = "the dense baseline of equal active FLOPs"
    if min(gains) > 0:
        return f"{subject} {_span(gains)} nats per token below {baseline}{doubt}."
    if max(gains) < 0:
        return f"{subject} {_span([-gain for gain in gains])} nats per token above {baseline}{doubt}."
    below = sum(gain > 0 for gain in gains)
    return f"{below} of {len(sparse)} models with experts end below {baseline}{doubt}."


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _balance(sparse: list[Row]) -> str:
    known = sorted(
        (r for r in sparse if r.get("max_violation") is not None), key=lambda r: r["max_violation"]
    )
    if not known:
        return ""
    shares = [f"{1 + row['max_violation']:.2f} times its share with {_name(row)}" for row in known]
    ends = shares if len(shares) == 1 else [shares[0], shares[-1]]
    sentence = f"On validation text the busiest expert gets {enumeration(ends)}"
    exact = [row for row in known if row.get("train_max_violation") == 0]
    if exact:
        sentence += f"; in training {_list(exact)} {_is(exact)} perfectly balanced"
    dead = [row for row in known if (row.get("dead_experts") or 0) > 0]
    if dead:
        sentence += f"; {_list(dead)} {'leaves' if len(dead) == 1 else 'leave'} experts without a token"
    return sentence + "."


def _leak(sparse: list[Row]) -> str:
    known = [row for row in sparse if row.get("leak") is not None]
    leaking = [row for row in known if row["leak"] > 0]
    if not known:
        return ""
    if not leaking:
        return "In training, no router's choice for a token depends on later tokens."
    shares = enumeration([f"{_name(row)} ({percent(row['leak'])})" for row in leaking])
    return f"In training, routes depend on later tokens with {shares}" + (
        "; the other routers leak nothing." if len(leaking) < len(known) else "."
    )


def _cost(sparse: list[Row], layers: int | None) -> str:
    known = [row for row in sparse if row.get("ms_route") is not None and row.get("ms_step")]
    if not known or not layers:
        return ""
    most = max(known, key=lambda row: row["ms_route"] / row["ms_step"])
    share = percent(layers * most["ms_route"] / most["ms_step"])
    return (
        f"Routing forward takes at most {share} of a training step, all layers together "
        f"({_name(most)}, {milliseconds(most['ms_route'])} ms a layer)."
    )


def _finite(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if math.isfinite(row.get("val_loss_mean") or math.nan)]


def _name(row: Row) -> str:
    return str(row["router"])


def _value(row: Row) -> str:
    spread = row.get("val_loss_std")
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    return f"{loss(row['val_loss_mean'], spread)} ({seeds})"


def _is(rows: list[Row]) -> str:
    return "is" if len(rows) == 1 else "are"


def _list(rows: list[Row]) -> str:
    return enumeration([_name(row) for row in rows])
