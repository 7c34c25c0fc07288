"""The measurements of an evaluation, each one skipped if its record is there, recorded when it is done.

Rows of records.jsonl: cost, part (sums over a few chunks), eval, layer_eval, speed, task, with their seconds.

Shapes: N chunks, L tokens of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from monge.conversion.evaluation.cost import active_shares, measure_cost
from monge.conversion.evaluation.embeddings import compare_embeddings
from monge.conversion.evaluation.layers import measure_layers, oracle
from monge.conversion.evaluation.quality import (
    Predictor,
    Sums,
    check_chunks,
    logits_of,
    predictor,
    sum_predictors,
)
from monge.conversion.evaluation.settings import EvalConfig
from monge.conversion.evaluation.speed import measure_speed
from monge.conversion.evaluation.tasks import requests_of, run_task
from monge.conversion.observer import Observer
from monge.conversion.source import Source
from monge.hf.blocks import possible_offsets
from monge.workspace.records import Record, Records

CHUNKS_OF_A_PART = 8
PREFILL, DECODE, TURNS = 512, 32, 3


@dataclass(frozen=True)
class Study:
    """What is compared, and where it is recorded."""

    dense: Source
    converted: Source
    config: EvalConfig
    records: Records
    observer: Observer

    @property
    def models(self) -> dict[str, Source]:
        """By the name that records give them."""
        return {"dense": self.dense, "converted": self.converted}


def record_costs(study: Study) -> None:
    """One ``cost`` row per model: `Cost`."""
    for name, source in study.models.items():
        if study.records.first("cost", model=name) is None:
            with _timed(study, {"kind": "cost", "model": name}) as row:
                row |= asdict(measure_cost(source.model, study.dense.model))


def record_quality(study: Study, text: str, chunks_NL: Tensor, *, neighbours: bool) -> None:
    """``eval`` rows of the converted model, with ``neighbours`` also at k-1 and k+1, and of the oracle.

    Parts of `CHUNKS_OF_A_PART` chunks are recorded as they are done; their sums, added in order, are the same
    whether or not the run was interrupted.
    """
    check_chunks((study.dense.model, study.converted.model), chunks_NL, study.config.batch)
    predictors = _predictors(study, neighbours)
    totals = {key: Sums() for key in predictors}
    study.observer.stage(f"quality, {text}", len(chunks_NL))
    for start in range(0, len(chunks_NL), CHUNKS_OF_A_PART):
        part_NL = chunks_NL[start : start + CHUNKS_OF_A_PART]
        row = study.records.first("part", text=text, start=start)
        if row is None:
            with _timed(study, {"kind": "part", "text": text, "start": start}) as row:
                sums = sum_predictors(
                    study.dense.model,
                    list(predictors.values()),
                    part_NL,
                    batch=study.config.batch,
                    observer=study.observer,
                )
                row["sums"] = [asdict(one) for one in sums]
        else:
            study.observer.advance(len(part_NL))
        for key, values in zip(predictors, row["sums"], strict=True):
            totals[key] += Sums(**values)
    for (model, k_offset), total in totals.items():
        row = {"kind": "eval", "model": model, "text": text, "k_offset": k_offset}
        if study.records.first(**row) is None:
            study.records.append(row | asdict(total.means()))


def record_embeddings(study: Study, text: str, chunks_NL: Tensor) -> None:
    """The ``eval`` row of an encoder: `EmbeddingQuality`."""
    row = {"kind": "eval", "model": "converted", "text": text}
    if study.records.first(**row) is None:
        study.observer.stage(f"embeddings, {text}", len(chunks_NL))
        models = study.dense.model, study.converted.model
        with _timed(study, row):
            row |= asdict(compare_embeddings(*models, chunks_NL, observer=study.observer))


def record_layers(study: Study, chunks_NL: Tensor) -> None:
    """One ``layer_eval`` row per layer: `LayerQuality` and the number of dead experts."""
    dense, converted = study.dense.model, study.converted.model
    shares = active_shares(converted, dense)
    if all(study.records.first("layer_eval", layer=layer) is not None for layer in shares):
        return
    study.records.keep(lambda row: row["kind"] != "layer_eval")
    study.observer.stage("layers", len(chunks_NL))
    began = time.perf_counter()
    layers = measure_layers(
        dense, converted, chunks_NL, shares=shares, batch=study.config.batch, observer=study.observer
    )
    each = (time.perf_counter() - began) / len(layers)
    for layer in layers:
        row = {"kind": "layer_eval", **asdict(layer), "dead": layer.dead, "share": shares[layer.layer]}
        study.records.append(row | {"seconds": each})


def record_speed(study: Study, prompt_L: Tensor) -> None:
    """One ``speed`` row per model: `Speed`."""
    if all(study.records.first("speed", model=name) is not None for name in study.models):
        return
    study.records.keep(lambda row: row["kind"] != "speed")
    models = {name: source.model for name, source in study.models.items()}
    contexts = [getattr(m.config, "max_position_embeddings", PREFILL + DECODE) for m in models.values()]
    prompt_L = prompt_L[: max(1, min(PREFILL, min(contexts) - DECODE))]
    study.observer.stage("speed", len(models) * (TURNS + 1))
    began = time.perf_counter()
    speeds = measure_speed(models, prompt_L, decode=DECODE, turns=TURNS, observer=study.observer)
    each = (time.perf_counter() - began) / len(speeds)
    for name, speed in speeds.items():
        sizes = {"prompt": len(prompt_L), "decode": DECODE}
        study.records.append({"kind": "speed", "model": name, **asdict(speed), **sizes, "seconds": each})


def record_tasks(study: Study) -> None:
    """One ``task`` row per task and model: `TaskScore`."""
    limit = study.config.limit or None
    for task in study.config.task_names:
        for name, source in study.models.items():
            if study.records.first("task", task=task, model=name) is None:
                study.observer.stage(f"{task}, {name}", requests_of(task, limit))
                with _timed(study, {"kind": "task", "model": name}) as row:
                    row |= asdict(
                        run_task(task, source.model, source.tokenizer, limit=limit, observer=study.observer)
                    )


def _predictors(study: Study, neighbours: bool) -> dict[tuple[str, int], Predictor]:
    """By (model, k_offset), in the order of the records."""
    dense, converted = study.dense.model, study.converted.model
    offsets = possible_offsets(converted, (0, -1, 1)) if neighbours else (0,)
    found: dict[tuple[str, int], Predictor] = {
        ("converted", offset): predictor(converted, offset) for offset in offsets
    }
    shares = {layer: min(share, 1.0) for layer, share in active_shares(converted, dense).items()}
    if neighbours and min(shares.values()) < 1:

        def best_neurons(ids_BL: Tensor) -> Tensor:
            with oracle(dense, shares):
                return logits_of(dense, ids_BL)

        found["oracle", 0] = best_neurons
    return found


@contextmanager
def _timed(study: Study, row: Record) -> Iterator[dict[str, Any]]:
    """Appends the row, filled in meanwhile, with its seconds, unless an error is raised."""
    began = time.perf_counter()
    yield row
    row["seconds"] = time.perf_counter() - began
    study.records.append(row)
