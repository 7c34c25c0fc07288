"""The experiment: every router with every seed, one after the other, on the same data."""

from __future__ import annotations

import json
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from monge.lab.config import ExperimentConfig
from monge.lab.evaluation import evaluate
from monge.lab.folder import find_data, missing_note, open_folder
from monge.lab.images import Images
from monge.lab.models import ImageShape, build_model, parameter_counts
from monge.lab.observer import Observer, Silent
from monge.lab.routers import DENSE, parse_router
from monge.lab.summary import summarise
from monge.lab.training import Run, shared_routing, train
from monge.routing import ROUTERS
from monge.workspace.machine import torch_threads, usable_device
from monge.workspace.memory import peak_bytes, reset_peak
from monge.workspace.ranks import Ranks
from monge.workspace.records import Record, Records
from monge.workspace.writing import prepare_folder, write_json

# Two checkpoints side by side while one replaces the other: weights and two moments of AdamW, in float32.
BYTES_PER_PARAMETER = 2 * 3 * 4
BYTES_OF_RECORDS = 2**24  # generous: records, tokenizer and figures


def compare(config: ExperimentConfig, out: Path, *, observer: Observer | None = None) -> list[dict[str, Any]]:
    """Train small models that differ in their router alone, and measure them.

    For every seed and router: transformers' tiny Llama (for a `VisionConfig` its ViT) with its feed-forward
    layers replaced by `monge.MoE`, the same initial weights and the same data in the same order,
    ``config.steps`` steps, then the measurements of `monge.lab.evaluation.evaluate`. ``out`` receives
    ``config.json``, ``tokenizer.json`` (text), ``records.jsonl`` and ``summary.json``. The same call goes on
    after an interruption at any moment, with bit-identical results at the same number of threads. With other
    routers or seeds it extends the comparison: runs that ``out`` holds are not repeated.

    Where ``torch.distributed`` is initialised all processes call this alike, with one folder: they share the
    batch of every step, and routers balance over all of it (`monge.routing.use_group`). The first one
    evaluates and writes, and all return its summary.

    Args:
        config: all that decides the figures: a `CompareConfig` (text) or `VisionConfig` (images).
        out: the output folder, made if need be.
        observer: is told of the progress, see `monge.lab.observer.Observer`.

    Returns:
        The summary: one dictionary per router, see `monge.lab.summary.summarise`.

    Raises:
        ValueError: an unknown router or device, missing or unreadable data, other settings than those that
            ``out`` was begun with, a batch that does not divide among the processes, or a diverging loss; the
            message names the remedy.
        OSError: ``out`` cannot be written, or the disk is full.
        ImportError: transformers or tokenizers is not installed.
    """
    ranks = Ranks.here()
    ranks.check_batch(config.batch)
    out, observer = Path(out), observer if observer is not None and ranks.first else Silent()
    found = find_data(config)
    images = found.shape if isinstance(found, Images) else None
    parameters = _largest_model(config, images)
    if ranks.first:
        prepare_folder(out, needed=BYTES_PER_PARAMETER * parameters + BYTES_OF_RECORDS)
    with torch_threads(config.threads):
        with ranks.first_alone():
            data = open_folder(out, config, found)
            records = Records(out / "records.jsonl")
        if note := missing_note(config):
            observer.message(note)
        runs = [(router, seed) for seed in range(config.seeds) for router in config.routers]
        for index, (router, seed) in enumerate(runs):
            observer.run_started(router, seed, config.steps, index, len(runs))
            checkpoint = out / "checkpoints" / f"{parse_router(router).file_name}-{seed}.safetensors"
            record = records.first("eval", router=router, seed=seed)
            if record is None:
                record = _run(Run(router, seed, config, data, records, checkpoint, observer, ranks), images)
            if record is not None and ranks.first:
                checkpoint.unlink(missing_ok=True)
                observer.run_finished(record)
    if ranks.first:
        with suppress(OSError):  # gone already, or not empty: then it is not ours alone
            (out / "checkpoints").rmdir()
        write_json(out / "summary.json", summarise(records, config, data.tokens_per_example))
    ranks.wait()
    return json.loads((out / "summary.json").read_text())


def _run(run: Run, images: ImageShape | None) -> Record | None:
    """Train and evaluate one run; returns its ``eval`` record, in the first process."""
    model = build_model(run.router, run.config, run.seed, images)
    measured = reset_peak(run.config.device)
    with shared_routing(model, run.ranks):
        history = train(model, run)
    run.ranks.wait()  # for the others to have read the checkpoint, which goes with the evaluation
    if not run.ranks.first:
        return None
    peak = peak_bytes(run.config.device) if measured else None  # of training since the last resumption
    result = evaluate(model, run.data, run.config)
    run.record(
        "eval",
        run.config.steps,
        **result,
        train_max_violation=history.train_max_violation(),
        ms_step=statistics.median(history.ms),
        wall_s=sum(history.ms) / 1000,
        peak_memory_bytes=peak,
    )
    return run.records.rows[-1]


def _largest_model(config: ExperimentConfig, images: ImageShape | None) -> int:
    """Parameters of the largest model. Building all of them first finds out early what cannot be built."""
    names = [parse_router(text).name for text in config.routers]
    unknown = [name for name in names if name not in (DENSE, *ROUTERS)]
    if unknown:
        raise ValueError(
            f"there is no router {', '.join(map(repr, unknown))}; "
            f"routers may name {DENSE}, {', '.join(ROUTERS)}."
        )
    usable_device(config.device)
    models = (build_model(router, config, 0, images) for router in config.routers)
    return max(parameter_counts(model, config)[0] for model in models)
