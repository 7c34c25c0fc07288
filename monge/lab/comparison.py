"""The experiment: every router with every seed, one after the other, on the same text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from monge.lab.evaluation import evaluate
from monge.lab.folder import open_folder
from monge.lab.models import build_model, parameter_counts
from monge.lab.observer import Observer, Silent
from monge.lab.presets import DENSE, CompareConfig
from monge.lab.training import Run, train
from monge.routing import ROUTERS
from monge.workspace.machine import usable_cores
from monge.workspace.records import Record, Records
from monge.workspace.text import find_domains
from monge.workspace.writing import prepare_folder, write_json

# Two checkpoints side by side while one replaces the other: weights and two moments of AdamW, in float32.
BYTES_PER_PARAMETER = 2 * 3 * 4
BYTES_OF_RECORDS = 2**24  # generous: records, tokenizer and figures


def compare(config: CompareConfig, out: Path, *, observer: Observer | None = None) -> list[dict[str, Any]]:
    """Train small language models that differ in their router alone, and measure them.

    For every seed and router: transformers' tiny Llama with its feed-forward layers replaced by `monge.MoE`,
    the same initial weights and the same data in the same order, ``config.steps`` steps, then the
    measurements of `monge.lab.evaluation.evaluate`. ``out`` receives ``config.json``, ``tokenizer.json``,
    ``records.jsonl`` and ``summary.json``. The same call goes on after an interruption at any moment, with
    bit-identical results at the same number of threads.

    Args:
        config: all that decides the figures.
        out: the output folder, made if need be.
        observer: is told of the progress, see `monge.lab.observer.Observer`.

    Returns:
        The summary: one dictionary per router, means over the seeds. ``val_loss_std`` is the sample standard
        deviation (None for one seed); fields about routing are None for the dense baseline.

    Raises:
        ValueError: an unknown router or device, missing or unreadable text, other settings than those that
            ``out`` was begun with, or a diverging loss; the message names the remedy.
        OSError: ``out`` cannot be written, or the disk is full.
        ImportError: transformers or tokenizers is not installed.
    """
    out, observer = Path(out), observer or Silent()
    parameters = _largest_model(config)
    domains = find_domains(config.text)
    prepare_folder(out, needed=BYTES_PER_PARAMETER * parameters + BYTES_OF_RECORDS)
    with _threads(config.threads):
        corpus = open_folder(out, config, domains)
        records = Records(out / "records.jsonl")
        runs = [(router, seed) for seed in range(config.seeds) for router in config.routers]
        for index, (router, seed) in enumerate(runs):
            observer.run_started(router, seed, config.steps, index, len(runs))
            checkpoint = out / "checkpoints" / f"{router}-{seed}.safetensors"
            record = records.first("eval", router=router, seed=seed)
            if record is None:
                record = _run(Run(router, seed, config, corpus, records, checkpoint, observer))
            checkpoint.unlink(missing_ok=True)
            observer.run_finished(record)
    with suppress(OSError):  # gone already, or not empty: then it is not ours alone
        (out / "checkpoints").rmdir()
    summary = summarise(records, config)
    write_json(out / "summary.json", summary)
    return summary


def summarise(records: Records, config: CompareConfig) -> list[dict[str, Any]]:
    """One row per router, in the order of the configuration: means over the seeds of the ``eval`` records."""
    rows = []
    for router in config.routers:
        evaluations = [records.first("eval", router=router, seed=seed) for seed in range(config.seeds)]
        finished = [record for record in evaluations if record is not None]
        losses = [record["val_loss"] for record in finished]
        rows.append(
            {
                "router": router,
                "seeds": len(finished),
                "val_loss_mean": statistics.fmean(losses),
                "val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
                "val_loss_own_mean": _mean(finished, "val_loss_own"),
                **{name: _mean(finished, name) for name in _AVERAGED},
                "params_total": finished[0]["params_total"],
                "params_active": finished[0]["params_active"],
                "steps": config.steps,
                "tokens": config.tokens,
            }
        )
    return rows


_AVERAGED = (
    "train_max_violation",
    "max_violation",
    "dead_experts",
    "leak",
    "ms_route",
    "ms_step",
    "wall_s",
    "ot_steps",
)


def _run(run: Run) -> Record:
    """Train and evaluate one run; returns its ``eval`` record."""
    model = build_model(run.router, run.config, run.seed)
    history = train(model, run)
    result = evaluate(model, run.corpus.val_NS, run.config)
    run.record(
        "eval",
        run.config.steps,
        **result,
        train_max_violation=history.train_max_violation(),
        ms_step=statistics.median(history.ms),
        wall_s=sum(history.ms) / 1000,
    )
    return run.records.rows[-1]


def _mean(records: list[Record], name: str) -> float | None:
    values = [record[name] for record in records]
    return None if None in values else statistics.fmean(values)


def _largest_model(config: CompareConfig) -> int:
    """Parameters of the largest model. Building all of them first finds out early what cannot be built."""
    unknown = [name for name in config.routers if name not in (DENSE, *ROUTERS)]
    if unknown:
        raise ValueError(
            f"there is no router {', '.join(map(repr, unknown))}; "
            f"routers may name {DENSE}, {', '.join(ROUTERS)}."
        )
    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {config.device!r} cannot be used here ({reason}). Try device cpu."
        ) from error
    return max(parameter_counts(build_model(name, config, 0), config)[0] for name in config.routers)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(wanted, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
