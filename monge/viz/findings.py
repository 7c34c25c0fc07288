"""What the figures allow to be said, in sentences, and nothing beyond.

Two routers are ranked only where the 95 % confidence interval of their difference, taken seed by seed, does
not hold zero (``minus`` in ``summary.json``). With one seed, or before all runs have finished, nothing is
ranked.
"""

from __future__ import annotations

import math

from monge.viz.columns import Row
from monge.viz.names import label
from monge.viz.numbers import difference, enumeration, increase, loss, milliseconds, percent, small
from monge.viz.records import DENSE, Comparison

DEMONSTRATION = "A demonstration, no ranking."


def headline(comparison: Comparison) -> str:
    """One or two sentences on the validation losses, after one on a synthetic start."""
    return " ".join(filter(None, (comparison.synthetic, _ranking(comparison))))


def _ranking(comparison: Comparison) -> str:
    rows = sorted(_finite(comparison), key=lambda row: row["val_loss_mean"])
    if not rows:
        return "No run has finished yet, so there is nothing to report."
    if len(rows) == 1:
        return f"{_name(rows[0])} ends at a validation loss of {_value(rows[0])}, the only model so far."
    if comparison.seeds < 2:
        low, high = loss(rows[0]["val_loss_mean"]), loss(rows[-1]["val_loss_mean"])
        seeds = "one seed" if all(row["seeds"] == 1 for row in rows) else "one seed of some"
        return (
            f"{DEMONSTRATION} The {len(rows)} models end between {low} and {high} {comparison.unit}, and "
            f"with {seeds} there is no spread that would tell a difference from chance."
        )
    if not all("minus" in row for row in rows):
        return (
            f"No ranking yet: the {len(rows)} models with finished runs end between "
            f"{loss(rows[0]['val_loss_mean'])} and {loss(rows[-1]['val_loss_mean'])} {comparison.unit}, and "
            "the intervals of their differences come with the summary of a finished comparison."
        )
    tied, behind = _split(rows)
    if len(tied) == len(rows):
        return (
            f"No ranking: the intervals do not separate {_list(tied)} "
            f"({loss(rows[0]['val_loss_mean'])} to {loss(rows[-1]['val_loss_mean'])} {comparison.unit})."
        )
    if len(tied) == 1:
        first = f"{_name(tied[0])} has the lowest validation loss, {_value(tied[0])} {comparison.unit}"
    else:
        first = f"The intervals do not separate {_list(tied)} at the lowest validation loss"
    gaps = [f"{_name(row)} by {row['val_loss_mean'] - rows[0]['val_loss_mean']:.3f}" for row in behind]
    return f"{first}; measurably behind: {enumeration(gaps)}."


def findings(comparison: Comparison) -> list[str]:
    """Further sentences, one per question: the reference, dense, balance, capacity, leak, bias, cost."""
    rows = _finite(comparison)
    sparse = [row for row in rows if row["router"] != DENSE]
    sentences = [
        _against_reference(sparse, comparison.reference),
        _against_dense(rows, sparse, comparison),
        _balance(sparse),
        _capacity(sparse, comparison.reference),
        _leak(sparse),
        _bias(sparse, comparison.settings.get("router_bias")),
        _cost(sparse, comparison.settings.get("layers")),
    ]
    return [sentence for sentence in sentences if sentence]


def separated(a: Row, b: Row) -> bool:
    """Whether the interval of the difference of two routers' losses does not hold zero."""
    interval = (a.get("minus") or {}).get(b["router"])
    return interval is not None and (interval["low"] > 0 or interval["high"] < 0)


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The routers that the lowest one is not separated from, itself included, and the others; rows ascend."""
    tied = [row for row in rows if row is rows[0] or not separated(row, rows[0])]
    return tied, [row for row in rows if row not in tied]


def _against_reference(sparse: list[Row], reference: str | None) -> str:
    """Which routers the intervals put below and above the reference."""
    others = [row for row in sparse if row["router"] != reference and (row.get("minus") or {}).get(reference)]
    if not others or reference is None:
        return ""
    parts = []
    for word, sign in (("below", -1), ("above", 1)):
        apart = [r for r in others if sign * r["minus"][reference]["mean"] > 0 and _apart(r, reference)]
        apart.sort(key=lambda row: row["minus"][reference]["mean"])
        if apart:
            named = [f"{_name(row)} ({difference(row['minus'][reference], 3)})" for row in apart]
            parts.append(f"{word} it {'is' if len(apart) == 1 else 'are'} {enumeration(named)}")
    rest = [row for row in others if not _apart(row, reference)]
    if rest:
        parts.append(f"not separated from it: {_list(rest)}")
    return f"Against {label(reference)}, in brackets the 95 % interval: {'; '.join(parts)}."


def _apart(row: Row, reference: str) -> bool:
    return separated(row, {"router": reference})


_DOUBT = (" (no interval excludes zero)", " (not every interval excludes zero)")


def _against_dense(rows: list[Row], sparse: list[Row], comparison: Comparison) -> str:
    dense = next((row for row in rows if row["router"] == DENSE), None)
    if dense is None or not sparse:
        return ""
    gains = [dense["val_loss_mean"] - row["val_loss_mean"] for row in sparse]
    beyond = sum(separated(row, dense) for row in sparse)
    doubt = " (one seed)" if comparison.seeds < 2 else _DOUBT[beyond > 0] if beyond < len(sparse) else ""
    subject = "Every model with experts ends" if len(sparse) > 1 else f"{_name(sparse[0])} ends"
    baseline = "the dense baseline of equal active FLOPs"
    if min(gains) > 0:
        return f"{subject} {_span(gains)} {comparison.unit} below {baseline}{doubt}."
    if max(gains) < 0:
        return f"{subject} {_span([-gain for gain in gains])} {comparison.unit} above {baseline}{doubt}."
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
    sentence = f"On validation data the busiest expert gets {enumeration(ends)}"
    exact = [row for row in known if row.get("train_max_violation") == 0]
    if exact:
        sentence += f"; in training {_list(exact)} {_is(exact)} perfectly balanced"
    dead = [row for row in known if (row.get("dead_experts") or 0) > 0]
    if dead:
        sentence += f"; {_list(dead)} {'leaves' if len(dead) == 1 else 'leave'} experts without a token"
    return sentence + "."


def _capacity(sparse: list[Row], reference: str | None) -> str:
    """What a static capacity of 1 costs in the method's own routing, least and most."""
    costs = [
        (row["val_loss_own_cf1"] - row["val_loss_own_mean"], row)
        for row in sparse
        if row.get("val_loss_own_cf1") is not None and row.get("val_loss_own_mean") is not None
    ]
    costs.sort(key=lambda cost: cost[0])
    if len(costs) < 2:
        return ""
    named = [f"{increase(cost)} with {_name(row)}" for cost, row in (costs[0], costs[-1])]
    theirs = next((cost for cost, row in costs if row["router"] == reference), None)
    middle = theirs is not None and reference not in (costs[0][1]["router"], costs[-1][1]["router"])
    named += [f"{increase(theirs)} with {label(reference)}"] if middle and reference else []
    return f"A static capacity of 1 moves the loss by {enumeration(named)}, each routed in its own way."


def _bias(sparse: list[Row], start: float | None) -> str:
    """Which routers unlearned a synthetic bias, and the gradient that did not reach it."""
    known = [row for row in sparse if row.get("bias_gap") is not None]
    if not start or not known:
        return ""
    low, high = (f(known, key=lambda row: row["bias_gap"]) for f in (min, max))
    weak = min(known, key=lambda row: row["bias_gradient"])
    return (
        f"Of the bias of {start:+g}, {increase(low['bias_gap'])} is left with {_name(low)} and "
        f"{increase(high['bias_gap'])} with {_name(high)}; the weakest gradient to it has {_name(weak)} "
        f"({small(weak['bias_gradient'])})."
    )


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
    return label(str(row["router"]))


def _value(row: Row) -> str:
    spread = row.get("val_loss_std")
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else "one seed"
    return f"{loss(row['val_loss_mean'], spread)} ({seeds})"


def _is(rows: list[Row]) -> str:
    return "is" if len(rows) == 1 else "are"


def _list(rows: list[Row]) -> str:
    return enumeration([_name(row) for row in rows])
