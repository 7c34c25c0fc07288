"""A conversion in progress: what is converted, on which text, and where its files lie."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.config import ConvertConfig
from monge.conversion.corpus import ConversionCorpus, open_corpus
from monge.conversion.exporting import TARGETS
from monge.conversion.exporting.choice import suited_gates
from monge.conversion.ffn import find_ffns
from monge.conversion.observer import Observer
from monge.conversion.partition import METHODS
from monge.conversion.plan import Plan, make_plan
from monge.conversion.source import Source, open_model
from monge.conversion.stages import Stages
from monge.conversion.streaming import model_on_disk
from monge.conversion.types import FFN
from monge.workspace.machine import usable_device
from monge.workspace.ranks import ALONE, Ranks
from monge.workspace.records import Record, Records
from monge.workspace.run import begin_run, check_digest, stored_run
from monge.workspace.writing import prepare_folder, write_json

IDENTITY = ("kind", "layer", "model", "text", "k_offset")  # rows equal in these tell of the same thing
COPIES = 6
"""Sizes of the model that the working files and the checkpoint may take at most."""


@dataclass
class Job:
    """Everything the stages share.

    Attributes:
        source: the model that is being converted, in place.
        reopen: gives the dense model again.
        gates: of the deployed model, those of the architecture that it will be written as.
        chunks: calibration inputs, of one size.
        corpus: None for a model that reads no text.
        about: what stands in config.json.
        ranks: the processes that share the work; the first alone writes records and config.json.
    """

    source: Source
    reopen: Callable[[], nn.Module]
    ffns: list[FFN]
    plan: Plan
    config: ConvertConfig
    gates: str
    chunks: Tensor
    corpus: ConversionCorpus | None
    observer: Observer
    out: Path | None = None
    stages: Stages = field(default_factory=lambda: Stages(None))
    records: Records | None = None
    about: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def record(self, row: Record) -> None:
        """Append to records.jsonl, replacing the row that an interrupted start wrote for the same thing."""
        if self.records is not None:
            same = {key: row[key] for key in IDENTITY if key in row}.items()
            self.records.keep(lambda old: not same <= old.items())
            self.records.append(row)

    def remember(self, **values: Any) -> None:
        """Add to config.json what was decided before a stage began, such as its number of steps."""
        self.about |= values
        if self.out is not None and self.ranks.first:
            write_json(self.out / "config.json", self.about)


def open_job(
    model: str | Path | nn.Module,
    config: ConvertConfig,
    out: Path | None,
    tokenizer: Any,
    inputs: Tensor | None,
    observer: Observer,
    stream: bool = False,
    ranks: Ranks = ALONE,
) -> Job:
    """Open model, text and folder, and find out before any work what cannot be done.

    Args:
        stream: leave the layers of the model on disk; see `monge.conversion.convert`.
        ranks: the processes of the job, of which the first opens the folder before the others do.

    Raises:
        ValueError: a model, text or setting that cannot be used, or a folder of another conversion.
        OSError: the folder cannot be written or is too small.
    """
    _check_method(config)
    if stream:
        _check_stream(model, config, out)
    device = usable_device(config.device)
    source, reopen = _open(model, tokenizer, stream, device)
    ffns = find_ffns(source.model)
    settings = asdict(config)
    config = _with_ffn_share(config, source.model, ffns)
    plan = make_plan(source, ffns, config)
    if out is not None and ranks.first:
        prepare_folder(out, needed=COPIES * sum(p.nbytes for p in source.model.parameters()))
    stored = None if out is None else stored_run(out, "convert", settings)
    if stored is not None and out is not None:
        check_digest(out, "model", stored["source"]["digest"], source.digest)
    corpus = None
    if inputs is None:
        corpus = open_corpus(source.tokenizer, config)
        chunks, digest = corpus.calibration_NL, corpus.digest
    else:
        chunks, digest = inputs, hashlib.sha256(inputs.cpu().contiguous().numpy().tobytes()).hexdigest()
    gates = _gates(source, ffns, config)
    job = Job(source, reopen, ffns, plan, config, gates, chunks.to(device), corpus, observer)
    if out is None:
        return job
    job.out, job.stages, job.ranks = out, Stages(out / "stages", device), ranks
    if ranks.first:
        job.records = Records(out / "records.jsonl")
    if stored is not None:
        check_digest(out, "text", stored["data"]["digest"], digest)
        job.about = stored
    else:
        job.about = begin_run(
            out,
            "convert",
            settings,
            source={"name": source.name, "digest": source.digest, "path": str(source.path)},
            data={"files": corpus.lists if corpus else {}, "digest": digest},
            plan=asdict(plan),
        )
    return job


def _with_ffn_share(config: ConvertConfig, model: nn.Module, ffns: list[FFN]) -> ConvertConfig:
    if not config.model_active:
        return config
    wanted = set(config.layers_of(len(ffns)))
    converted = sum(ffn.read().matrix_parameters for ffn in ffns if ffn.layer in wanted)
    return config.with_ffn_share(sum(parameter.numel() for parameter in model.parameters()), converted)


def _gates(source: Source, ffns: list[FFN], config: ConvertConfig) -> str:
    """A name of `monge.conversion.building.GATE_SCALES`."""
    if config.gates == "binary":
        return config.gates
    shape = config.shape_for(ffns[0].read().neurons)
    return suited_gates(type(source.model).__name__, shared=shape.shared > 0)


def _check_method(config: ConvertConfig) -> None:
    for name in (config.method, config.start_from):
        if name and name not in METHODS:
            raise ValueError(f"there is no method {name!r}; methods: {', '.join(METHODS)}")
    if config.start_from and METHODS[config.method].function is not None:
        raise ValueError(
            f"start_from={config.start_from!r} is for method dot, which can start from a partition"
        )
    dense = METHODS[config.method].dense or (config.start_from and METHODS[config.start_from].dense)
    if dense and (config.start_from or config.router == "trained"):
        raise ValueError("static pruning has no experts: it is no start and has no router to train")
    names = [name for name in (config.method, config.start_from) if name]
    if config.budgets and (dense or any(METHODS[name].needs_gradients for name in names)):
        raise ValueError(f"method {names[-1]!r} divides all layers alike: leave budgets out")
    if dense and config.layers:
        raise ValueError(
            "static pruning needs all layers: a configuration knows one width of FFN (leave out --layers)"
        )
    if config.to not in ("auto", *TARGETS):
        raise ValueError(f"there is no target {config.to!r}; targets: auto, {', '.join(TARGETS)}")


def _check_stream(model: str | Path | nn.Module, config: ConvertConfig, out: Path | None) -> None:
    if isinstance(model, nn.Module) or out is None:
        raise ValueError("stream is for a checkpoint's folder or hub name, converted into a folder (out=...)")
    methods = [METHODS[name] for name in (config.method, config.start_from) if name]
    whole = {
        f"method {config.method!r}": any(m.function is None or m.needs_gradients for m in methods),
        f"router {config.router!r}": config.router == "trained",
        "static pruning": METHODS[config.method].dense,
        "fine-tuning": config.minutes > 0,
        f"device {config.device!r}": config.device != "cpu",
    }
    if needs := [name for name, applies in whole.items() if applies]:
        raise ValueError(
            f"{needs[0]} needs the whole model in memory, and --stream leaves its layers on disk: leave "
            "--stream out, or take a method that works layer by layer, such as ot_lloyd with router ridge "
            "and minutes 0"
        )


def _open(
    model: str | Path | nn.Module, tokenizer: Any, stream: bool, device: torch.device
) -> tuple[Source, Callable[[], nn.Module]]:
    if not isinstance(model, nn.Module):
        source = open_model(model, stream=stream)
        if stream:
            return source, lambda: model_on_disk(type(source.model), source.path)
        source.model.to(device)
        return source, lambda: open_model(model).model.to(device)
    for parameter in model.parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"model has {parameter.dtype} weights: convert it in float32, `model.float()`")
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    name = type(model).__name__
    causal = getattr(model, "get_output_embeddings", lambda: None)() is not None and "CausalLM" in name
    source = Source(
        model=copy.deepcopy(model).to(device).eval(),
        tokenizer=tokenizer,
        config=getattr(model, "config", None),
        name=name,
        path=Path(),
        digest=digest.hexdigest(),
        causal=causal,
    )
    return source, lambda: copy.deepcopy(model).to(device).eval()
