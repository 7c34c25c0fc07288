"""`convert`: a dense model in, a Mixture of Experts out.

    open --> [align] --> partition, router, refit (layer by layer) --> [fine-tune] --> evaluate --> export

With an output folder every stage leaves its files there, and the same command goes on from them after any
interruption, to the same bits at the same number of threads.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monge.conversion.assessment import assess
from monge.conversion.closed_form import convert_layers
from monge.conversion.config import ConvertConfig
from monge.conversion.evaluation import peak_memory_bytes
from monge.conversion.exporting import export
from monge.conversion.job import Job, open_job
from monge.conversion.observer import Observer, Silent
from monge.conversion.temperature import calibrate_certainty
from monge.conversion.training import aligned_partitions, finetune_model, importance_of
from monge.workspace.machine import torch_threads
from monge.workspace.ranks import Ranks
from monge.workspace.writing import write_json

MODEL_FOLDER = "model"


@dataclass(frozen=True)
class ConvertResult:
    """A converted model.

    Attributes:
        model: the source's transformers model with `monge.MoE` in the place of its FFNs (narrower FFNs after
            static pruning), float32, in evaluation mode; with ``stream`` its layers are on disk, in ``out``.
        tokenizer: the source's.
        summary: perplexity, perplexity_dense, kl (nats per token), agreement (share of equal first choices),
            ffn_active, params_active, params_total, seconds (of the start that
            finished it), peak_memory_bytes.
        path: the written checkpoint, None without an output folder.
    """

    model: nn.Module
    tokenizer: Any
    config: ConvertConfig
    summary: dict[str, Any]
    path: Path | None


def convert(
    model: str | Path | nn.Module,
    config: ConvertConfig | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    inputs: Tensor | None = None,
    observer: Observer | None = None,
    stream: bool = False,
) -> ConvertResult:
    """Turn the dense FFNs of ``model`` into Mixtures of Experts.

    Where ``torch.distributed`` is initialised all processes call this alike, with one folder: they share the
    steps of fine-tuning; the first does what comes before and after, writes, and gives its summary to all.

    Args:
        model: a folder of safetensors, a .gguf file, a hub name, or a transformers model, which is copied.
        config: `ConvertConfig`.
        out: folder for the checkpoint (``out/model``), records and stage files; None keeps all in memory.
        tokenizer: of a model given as a module.
        inputs: calibration inputs for a model that reads no text, such as images (N, channels, height,
            width).
        observer: is told of the progress.
        stream: for a model larger than memory: its layers stay on disk, each is read when its turn comes, and
            the checkpoint is written layer by layer. Embeddings and head are held, and what a layer needs for
            its conversion. The result is the same. For methods that work layer by layer, without fine-tuning.

    Raises:
        ValueError: a model, text or setting that cannot be used, or a folder of another conversion; the
            message names the remedy.
        OSError: ``out`` cannot be written, or the disk is full; nothing is left half-written.

    Source: arXiv 2606.01666 (DOT-MoE) for method "dot"; the closed form is Monge's own.

    Examples:
        >>> import monge
        >>> from monge.conversion import ConvertConfig
        >>> result = monge.convert("dense.gguf", ConvertConfig(ffn_active=0.5), out="smol")  # doctest: +SKIP
        >>> result.path  # doctest: +SKIP
        PosixPath('smol/model')
    """
    config = config or ConvertConfig()
    ranks = Ranks.here()
    observer = observer if observer is not None and ranks.first else Silent()
    folder = None if out is None else Path(out)
    if ranks.size > 1 and (folder is None or stream):
        raise ValueError(
            f"{ranks.size} processes share the training of a whole model, and find stages in one "
            "folder: give out, and leave stream to a single process"
        )
    if config.minutes or config.aligns:
        ranks.check_batch(config.batch)
    with torch_threads(config.threads):
        began = time.perf_counter()
        with ranks.first_alone():
            job = open_job(model, config, folder, tokenizer, inputs, observer, stream, ranks)
        for line in job.plan.lines():
            observer.message(line)
        _transform(job)
        finetune_model(job)
        if ranks.first:
            summary = assess(job)
            summary |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes()}
            path = _write(job, summary)
        ranks.wait()
        if not ranks.first:
            assert folder is not None
            summary, path = json.loads((folder / "summary.json").read_text()), folder / MODEL_FOLDER
    return ConvertResult(job.source.model, job.source.tokenizer, config, summary, path)


def _transform(job: Job) -> None:
    """The model of the job becomes the converted one, but for fine-tuning.

    The first process alone does what is not joint training; the others find its stages.
    """
    with job.ranks.first_alone():
        importance = importance_of(job)
    given = aligned_partitions(job, importance)
    with job.ranks.first_alone():
        convert_layers(
            job.source.model,
            job.ffns,
            job.chunks,
            job.config,
            job.stages,
            gates=job.gates,
            given=given,
            importance=importance,
            observer=job.observer,
            record=job.record,
        )
        if job.config.refit and job.source.causal and job.corpus is not None:
            scale = calibrate_certainty(
                job.source.model, job.reopen(), job.corpus.selection_NL.to(job.chunks.device)
            )
            job.record({"kind": "scale", "scale": scale})


def _write(job: Job, summary: dict[str, Any]) -> Path | None:
    """The checkpoint, then the summary: where there is a summary, the conversion is whole."""
    if job.out is None:
        return None
    card = {
        "source": job.source.name,
        "method": job.config.method,
        "calibration tokens": job.config.tokens,
        "fine-tuning steps": job.about.get("finetune_steps", 0),
        **summary,
    }
    path = export(
        job.source.model,
        job.out / MODEL_FOLDER,
        tokenizer=job.source.tokenizer,
        to=job.config.to,
        card=card,
    )
    write_json(job.out / "summary.json", summary)
    return path
