"""What the figures of conversions allow to be said, in sentences, and nothing beyond.

Two results are ranked only where the spread over seeds separates them (`monge.viz.spread`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from monge.viz.conversion.layers import layer_errors
from monge.viz.conversion.results import Result
from monge.viz.conversion.routing import KINDS, loads_of
from monge.viz.conversion.runs import CONVERTED, DENSE, HELD_OUT, ORACLE, Run
from monge.viz.conversion.tasks import kept, paired_tasks
from monge.viz.numbers import count, enumeration, figure, percent
from monge.viz.spread import separated

HELD = "held-out text"


def headline(results: Sequence[Result]) -> str:
    """One or two sentences: what the first result kept, and where it stands among the others."""
    first = results[0]
    return " ".join(filter(None, (_kept(first), _beside(first, results[1:]))))


def findings(run: Run) -> list[str]:
    """Further sentences on one run: layers, experts, neighbours, oracle, other text, speed, tasks."""
    sentences = [
        _layers(run),
        _experts(run),
        _neighbours(run),
        _oracle(run),
        _other_text(run),
        _speed(run),
        _tasks(run),
    ]
    return [sentence for sentence in sentences if sentence]


def _kept(result: Result) -> str:
    row = result.row
    share = _share(result)
    if row["ratio"] is not None:
        steps = f" after {_plural(row['steps'], 'step')} of fine-tuning" if row["steps"] else ""
        values = f"{figure(row['perplexity'])} against {figure(row['perplexity_dense'])}"
        ratio = figure(row["ratio"], row.get("ratio_std"))
        return (
            f"With {share}, {_name(result)} has {ratio} times the perplexity of the dense model on held-out "
            f"text{steps} ({values}; {_seeds(result)})."
        )
    if row["cosine"] is not None:
        cosine = figure(row["cosine"], row.get("cosine_std"))
        return (
            f"With {share}, the embeddings of {_name(result)} have a cosine of {cosine} with those of the "
            f"dense model on held-out text ({_seeds(result)})."
        )
    run = result.runs[0]
    if run.complete:
        return f"{_name(result)} uses {share}; its quality was not measured, for want of held-out text."
    return f"Nothing has been measured yet of {_name(result)}, which is to use {share}."


def _share(result: Result) -> str:
    row = result.row
    parts = [f"{percent(row['ffn_active'])} of the FFN neurons"] if row["ffn_active"] is not None else []
    parts += [f"{percent(row['active'])} of all parameters"] if row["active"] is not None else []
    return f"{' and '.join(parts)} active per token" if parts else "an unknown share of its neurons"


def _plural(number: float, word: str) -> str:
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def _seeds(result: Result) -> str:
    return f"{len(result.runs)} seeds" if len(result.runs) > 1 else "one seed"


def _beside(first: Result, others: Sequence[Result]) -> str:
    """Where the first result stands among those of the same share."""
    sample = first.sample
    peers = [
        other
        for other in others
        if other.sample
        and _close(other.row["ffn_active"], first.row["ffn_active"])
        and other.runs[0].command == first.runs[0].command
    ]
    if sample is None or not peers:
        return ""
    known = [sample, *(peer.sample for peer in peers if peer.sample)]
    ahead: list[str] = []
    behind: list[str] = []
    tied: list[str] = []
    for peer in peers:
        assert peer.sample is not None
        apart = separated(sample, peer.sample, known)
        (tied if not apart else behind if peer.sample.mean > sample.mean else ahead).append(_value(peer))
    if not ahead and not behind:
        verb = "stands" if len(tied) == 1 else "stand"
        reason = (
            "with one seed there is no spread that would tell a difference from chance"
            if min(one.count for one in known) < 2
            else "the spread over seeds does not separate them"
        )
        return f"At the same share {verb} {enumeration(tied)}; no ranking: {reason}."
    parts = [f"measurably better than {enumeration(behind)}"] if behind else []
    parts += [f"measurably worse than {enumeration(ahead)}"] if ahead else []
    parts += [f"not separated from {enumeration(tied)}"] if tied else []
    return f"At the same share it is {enumeration(parts)}."


def _value(result: Result) -> str:
    return _name(result, figure(result.row["ratio"], result.row.get("ratio_std")))


def _name(result: Result, *details: str) -> str:
    """'static (fine-tuned, 1.337)': no commas among those of the sentence."""
    method, *variant = result.name.split(", ")
    brackets = ", ".join([*variant, *details])
    return f"{method} ({brackets})" if brackets else method


def _close(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, abs_tol=5e-3)


def _layers(run: Run) -> str:
    errors = {name: values for name, (_, values) in layer_errors(run).items()}
    layers = {name: numbers for name, (numbers, _) in layer_errors(run).items()}
    parts = []
    if "before the refit" in errors and "after the refit" in errors:
        before, after = errors["before the refit"].mean(), errors["after the refit"].mean()
        if before != after:
            parts.append(f"the refit lowers the mean error of a layer from {before:.3f} to {after:.3f}")
    if HELD in errors:
        worst = int(errors[HELD].argmax())
        parts.append(
            f"on held-out text {'it' if parts else 'the mean error of a layer'} is "
            f"{errors[HELD].mean():.3f} and at worst {errors[HELD][worst]:.3f} "
            f"(layer {layers[HELD][worst]})"
        )
        if ORACLE in errors:
            parts[-1] += f", against {errors[ORACLE].mean():.3f} of the oracle"
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _experts(run: Run) -> str:
    for kind in reversed(KINDS):
        loads = loads_of(run, kind)
        if loads:
            busiest = statistics.fmean(float(load_E.max()) for load_E in loads.values())
            dead = sum(int((load_E == 0).sum()) for load_E in loads.values())
            total = sum(len(load_E) for load_E in loads.values())
            idle = f"{dead} of {total} experts" if dead else "no expert"
            verb = "goes" if dead < 2 else "go"
            return (
                f"On {KINDS[kind]} the busiest expert of a layer gets {busiest:.2f} times an equal share, "
                f"mean over layers; {idle} {verb} without a token."
            )
    return ""


def _neighbours(run: Run) -> str:
    rows = {row.get("k_offset"): row for row in run.of("eval", model=CONVERTED, text=HELD_OUT)}
    words = {-1: "one expert less", 1: "one expert more"}
    parts = [
        f"with {words[offset]} per token the ratio to dense is {figure(_ratio(rows[offset]))}"
        for offset in words
        if offset in rows
    ]
    return (
        f"{enumeration(parts).capitalize()}, with its own number {figure(_ratio(rows[0]))}."
        if parts and 0 in rows
        else ""
    )


def _oracle(run: Run) -> str:
    row = run.quality(ORACLE)
    if not row:
        return ""
    return (
        f"The dense model with the best neurons of every token, as many and unchanged, is at "
        f"{figure(_ratio(row))} times its own perplexity."
    )


def _other_text(run: Run) -> str:
    rows = [
        row for row in run.of("eval", model=CONVERTED) if row["text"] != HELD_OUT and not row.get("k_offset")
    ]
    parts = [f"{figure(_ratio(row))} on {row['text']}" for row in rows if "perplexity" in row]
    parts += [f"{figure(row['cosine'])} on {row['text']}" for row in rows if "cosine" in row]
    what = "cosine" if rows and "cosine" in rows[0] else "ratio to the dense perplexity"
    return f"On text of another kind the {what} is {enumeration(parts)}." if parts else ""


def _speed(run: Run) -> str:
    rows = {row["model"]: row for row in run.of("speed")}
    if not {DENSE, CONVERTED} <= rows.keys():
        return ""
    times = [
        f"{rows[CONVERTED][name] / rows[DENSE][name]:.2f} times the dense model's tokens per second {where}"
        for name, where in (("prefill_tokens_per_s", "at prefill"), ("decode_tokens_per_s", "in decoding"))
    ]
    return f"On this machine it reaches {enumeration(times)}."


def _tasks(run: Run) -> str:
    tasks = paired_tasks(run)
    if not tasks:
        return ""
    dense = statistics.fmean(before["accuracy"] for before, _ in tasks)
    converted = statistics.fmean(after["accuracy"] for _, after in tasks)
    chance = statistics.fmean(before["chance"] for before, _ in tasks)
    above = kept(dense, converted, chance)
    extra = f", {percent(above)} of what it has above chance" if above is not None else ""
    number = f"{len(tasks)} zero-shot tasks" if len(tasks) > 1 else "the zero-shot task"
    return f"On {number} it keeps {percent(kept(dense, converted))} of the dense model's accuracy{extra}."


def _ratio(row: dict[str, float]) -> float:
    return row["perplexity"] / row["perplexity_dense"]
