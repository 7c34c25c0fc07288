"""summary.json of a comparison: one row per router, from the ``eval`` records of its seeds."""

from __future__ import annotations

import statistics
from typing import Any

from monge.lab.config import ExperimentConfig
from monge.lab.paired import paired_difference
from monge.workspace.records import Record, Records

# Averaged over seeds under their own name; None where a run has none.
AVERAGED = (
    "val_loss_cf1",
    "val_loss_cf125",
    "val_loss_own_cf1",
    "val_loss_own_cf125",
    "val_loss_by_domain",
    "train_max_violation",
    "max_violation",
    "dead_experts",
    "leak",
    "leak_kl",
    "specialisation",
    "bias_gap",
    "bias_gradient",
    "corrupted",
    "ms_route",
    "ms_step",
    "wall_s",
    "peak_memory_bytes",
    "ot_steps",
)
OF_IMAGES = ("accuracy", "accuracy_corrupted")


def summarise(records: Records, config: ExperimentConfig, tokens_per_example: int) -> list[dict[str, Any]]:
    """One row per router that has finished a run, in the order of the configuration.

    Means over the seeds of the fields of `monge.lab.evaluation.evaluate`; ``val_loss_mean``, ``val_loss_std``
    (of the sample; None for one seed) and ``val_loss_own_mean``; of images ``accuracy_std`` too. ``minus``:
    the paired difference of the validation loss (``mean`` and 95 % interval ``low``, ``high``, see
    `monge.lab.paired`) to every other router, None with fewer than two common seeds; ``accuracy_minus``: the
    same of the accuracy, in images. ``synthetic``: whether the experts were made unequal on purpose. Fields
    about routing are None for the dense baseline.
    """
    finished = {
        router: [
            record
            for seed in range(config.seeds)
            if (record := records.first("eval", router=router, seed=seed)) is not None
        ]
        for router in config.routers
    }
    finished = {router: evaluations for router, evaluations in finished.items() if evaluations}
    rows = []
    for router, evaluations in finished.items():
        others = {name: runs for name, runs in finished.items() if name != router}
        row = {
            "router": router,
            "seeds": len(evaluations),
            "val_loss_mean": _mean(evaluations, "val_loss"),
            "val_loss_std": _std(evaluations, "val_loss"),
            "val_loss_own_mean": _mean(evaluations, "val_loss_own"),
            "minus": {name: _difference(evaluations, runs, "val_loss") for name, runs in others.items()},
            **{name: _mean(evaluations, name) for name in AVERAGED},
            "synthetic": bool(config.router_bias),
            "params_total": evaluations[0]["params_total"],
            "params_active": evaluations[0]["params_active"],
            "steps": config.steps,
            "tokens": config.steps * config.batch * tokens_per_example,
        }
        if "accuracy" in evaluations[0]:
            row |= {name: _mean(evaluations, name) for name in OF_IMAGES}
            row |= {f"{name}_std": _std(evaluations, name) for name in OF_IMAGES}
            row["accuracy_minus"] = {
                name: _difference(evaluations, runs, "accuracy") for name, runs in others.items()
            }
        rows.append(row)
    return rows


def _difference(runs: list[Record], others: list[Record], name: str) -> dict[str, float] | None:
    a, b = ({run["seed"]: run[name] for run in records} for records in (runs, others))
    return paired_difference(a, b)


def _mean(records: list[Record], name: str) -> Any:
    return _mean_of([record[name] for record in records])


def _mean_of(values: list[Any]) -> Any:
    """The mean of numbers, or of dictionaries entry by entry; None where one is missing."""
    if None in values:
        return None
    if isinstance(values[0], dict):
        return {key: _mean_of([value[key] for value in values]) for key in values[0]}
    return statistics.fmean(values)


def _std(records: list[Record], name: str) -> float | None:
    values = [record[name] for record in records]
    return statistics.stdev(values) if len(values) > 1 else None
