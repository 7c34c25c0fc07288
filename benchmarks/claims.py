"""What the papers claim, and what came out here: claim, what was run, figure with its interval, verdict.

    python -m benchmarks.claims RUNS [--markdown]     # RUNS: a folder that holds those of monge compare

A claim is a difference between two routers, seed by seed (`monge.lab.paired`). It holds where the 95 %
interval lies on its side of the threshold, does not hold where it lies on the other, and is not decidable at
this scale where it holds the threshold. The presets are those of `monge compare`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from monge.lab.paired import paired_difference
from monge.viz.names import label
from monge.workspace.records import Records


@dataclass(frozen=True)
class Claim:
    """``measure(router) < measure(than) + threshold``; ``than`` None compares with the threshold itself.

    A measure is a path into an ``eval`` record, `a/b/c`, or a difference of two, `a - b`.
    """

    source: str
    text: str
    preset: str
    router: str
    than: str | None = None
    measure: str = "val_loss"
    threshold: float = 0.0
    times: float = 1.0  # than's figure is multiplied by this
    less: bool = True


SSR, MAXSCORE, OURS = "SSR, 2511.08972", "MaxScore, 2508.12801", "Monge"
TEXT, SWAPS = "corrupted/random tokens/0.15", "corrupted/swapped words/0.15"
DROPS, LOADS, IMAGES = "val_loss_cf1 - val_loss", "train_max_violation", "accuracy_corrupted"
ABLATED = "maxscore:flow=False,coefficient=0.01"
CLAIMS = (
    *(
        Claim(SSR, "lower loss than softmax top-k", preset, router, "topk")
        for preset, router in (
            ("natural", "ssr"), ("natural", "ssr:carry=True"),
            ("papers", "ssr:p=0.001"), ("papers", "ssr:p=0.01"), ("papers", "ssr:p=0.1"),
        )
    ),
    Claim(SSR, "lower loss than routing by Sinkhorn on every step", "natural", "ssr", "ssr:p=1"),
    Claim(SSR, "faster steps than Sinkhorn on every step", "natural", "ssr", "ssr:p=1", "ms_step"),
    Claim(SSR, "faster steps than an auxiliary loss", "natural", "ssr", "switch", "ms_step"),
    Claim(SSR, "better balance in training than softmax top-k", "natural", "ssr", "topk", LOADS),
    Claim(SSR, "loses less to random tokens than softmax top-k", "natural", "ssr", "topk", TEXT),
    Claim(SSR, "loses less to swapped words than softmax top-k", "natural", "ssr", "topk", SWAPS),
    Claim(SSR, "more accurate on corrupted images", "vision", "ssr", "topk", IMAGES, less=False),
    Claim(MAXSCORE, "perfect balance in training", "natural", "maxscore", None, LOADS, 1e-9),
    *(
        Claim(MAXSCORE, f"lower loss than {what}", preset, "maxscore", than)
        for preset, than, what in (
            ("natural", "topk", "softmax top-k"),
            ("natural", "switch", "an auxiliary loss"),
            ("natural", "lossfree", "DeepSeek-V3's bias"),
            ("papers", "switch:capacity_factor=1.0", "dropping at capacity 1"),
        )
    ),
    Claim(MAXSCORE, "the flow helps", "papers", "maxscore:coefficient=0.01", ABLATED),
    Claim(
        MAXSCORE, "the flow helps, with SoftTopk", "papers",
        "maxscore:gates=annealed,coefficient=0.01", "maxscore:flow=False,gates=annealed,coefficient=0.01",
    ),
    Claim(
        MAXSCORE, "SoftTopk helps", "papers",
        "maxscore:gates=annealed,coefficient=0.01", "maxscore:coefficient=0.01",
    ),
    Claim(
        MAXSCORE, "SoftTopk helps, without the flow", "papers",
        "maxscore:flow=False,gates=annealed,coefficient=0.01", ABLATED,
    ),
    *(
        Claim(OURS, "more than .05 below dense at equal active FLOPs", "natural", router, "dense",
              threshold=-0.05)
        for router in ("topk", "maxscore", "prices", "ssr")
    ),
    *(
        Claim(OURS, "loses at most half of top-k's loss to a static capacity of 1", "natural", router, "topk",
              DROPS, times=0.5)
        for router in ("prices", "maxscore")
    ),
    *(
        Claim(OURS, f"unbalanced on purpose: {router} below {than}", "stress", router, than)
        for router, than in (("prices", "maxscore"), ("maxscore", "topk"), ("prices", "topk"),
                             ("ssr:carry=True", "ssr"), ("ssr:carry=True", "prices"))
    ),
    *(
        Claim(OURS, "unbalanced on purpose: no dead experts", "stress", router, None, "dead_experts", 1e-9)
        for router in ("ssr:carry=True", "maxscore", "prices")
    ),
    *(
        Claim(OURS, "unbalanced on purpose: experts stay dead", "stress", router, None, "dead_experts", 1,
              less=False)
        for router in ("topk", "ssr")
    ),
)  # fmt: skip


def figures(folder: Path) -> dict[str, dict[int, dict]]:
    """The ``eval`` records by router and seed."""
    found: dict[str, dict[int, dict]] = {}
    for record in Records(folder / "records.jsonl").rows:
        if record["kind"] == "eval":
            found.setdefault(record["router"], {})[record["seed"]] = record
    return found


def judge(claim: Claim, runs: dict[str, dict[int, dict]]) -> tuple[str, str, int]:
    """The figure with its interval, the verdict, and the number of seeds."""
    measured = _by_seed(runs.get(claim.router, {}), claim.measure)
    if claim.than is None:
        others = dict.fromkeys(measured, 0.0)
    else:
        others = {
            seed: claim.times * value
            for seed, value in _by_seed(runs.get(claim.than, {}), claim.measure).items()
        }
    seeds = len(measured.keys() & others.keys())
    interval = paired_difference(measured, others)
    if interval is None:
        return "", "not run", seeds
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    told = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    if not claim.less:
        low, high = -high, -low
    limit = claim.threshold if claim.less else -claim.threshold
    verdict = "holds" if high < limit else "does not hold" if low > limit else "not decidable"
    return told, verdict, seeds


def _by_seed(records: dict[int, dict], measure: str) -> dict[int, float]:
    plus, _, minus = measure.partition(" - ")
    return {
        seed: _at(record, plus) - (_at(record, minus) if minus else 0.0)
        for seed, record in sorted(records.items())
    }


def _at(record: dict, path: str) -> float:
    for name in path.split("/"):
        record = record[name]
    return float(record)  # type: ignore[arg-type]


def _settings(preset: str) -> str:
    """`papers` trains other routers than `natural`, in the same way: their runs may stand in one folder."""
    return "natural" if preset == "papers" else preset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    presets: dict[str, dict[str, dict[int, dict]]] = {}
    for config in sorted(args.runs.glob("*/config.json")):
        stored = json.loads(config.read_text())
        if stored.get("command") == "compare":
            runs = presets.setdefault(_settings(stored["config"]["preset"]), {})
            for router, by_seed in figures(config.parent).items():
                runs.setdefault(router, {}).update(by_seed)
    rows = []
    for claim in CLAIMS:
        told, verdict, seeds = judge(claim, presets.get(_settings(claim.preset), {}))
        what = f"{claim.measure}: {label(claim.router)}"
        if claim.than:
            what += " - " + (f"{claim.times:g} x " if claim.times != 1 else "") + label(claim.than)
        rows.append((claim.source, claim.text, f"{claim.preset}, {seeds} seeds: {what}", told, verdict))
    head = ("source", "claim", "what was run", "difference, 95 % interval", "verdict")
    if args.markdown:
        print("\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * 5, *rows)))
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
