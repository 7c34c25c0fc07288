"""The stages of a conversion that train: joint alignment before the closed form, fine-tuning after it.

Shapes: N sequences, L tokens in each, C clusters of tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from monge.conversion.alignment import AlignmentConfig, align
from monge.conversion.budget import plan_steps
from monge.conversion.closed_form import divide_layers
from monge.conversion.finetune import finetune
from monge.conversion.importance import neuron_importance
from monge.conversion.job import Job
from monge.conversion.partition import METHODS
from monge.conversion.teacher import BATCH, Head, Teacher
from monge.conversion.types import Partition

MOST_STEPS = 100_000  # of fine-tuning: bounds the text that is drawn before the number of steps is known


def importance_of(job: Job) -> dict[int, Tensor]:
    """(C, F) gradient statistics by layer, for the method that needs them."""
    if not any(METHODS[name].needs_gradients for name in (job.config.method, job.config.start_from) if name):
        return {}
    stored = job.stages.load("importance")
    if stored is None:
        clusters = job.config.shape_for(job.ffns[0].read().neurons).routed
        found = neuron_importance(
            job.source.model, job.ffns, job.chunks, clusters, job.config.seed, observer=job.observer
        )
        stored = {str(ffn.layer): value for ffn, value in zip(job.ffns, found)}, {}
        job.stages.save("importance", *stored)
    return {int(layer): value for layer, value in stored[0].items()}


def aligned_partitions(job: Job, importance: dict[int, Tensor]) -> dict[int, Partition]:
    """Partitions and routers by layer from joint training, where the settings ask for it."""
    config = job.config
    if not config.aligns:
        return {}
    learned = METHODS[config.method].function is None
    wanted = config.layers_of(len(job.ffns))
    ffns = [ffn for ffn in job.ffns if ffn.layer in wanted]
    stored = job.stages.load("aligned")
    if stored is None:
        start = config.start_from if learned else config.method
        partitions = None
        if start:
            with job.ranks.first_alone():
                partitions = _divided(job, start, importance)
        result = align(
            job.source.model,
            ffns,
            list(job.chunks.split(config.batch)),
            [config.shape_for(ffn.read().neurons, ffn.layer) for ffn in ffns],
            partitions=partitions,
            config=AlignmentConfig(learn_partition=learned),
            steps=config.align_steps,
            seed=config.seed,
            checkpoint=job.stages.path("alignment"),
            observer=job.observer,
            ranks=job.ranks,
        )
        stored = _as_tensors(wanted, result.partitions), {}
        if job.ranks.first:
            job.stages.save("aligned", *stored)
    return _as_partitions(stored[0])


def _divided(job: Job, method: str, importance: dict[int, Tensor]) -> list[Partition]:
    """Where joint training starts: the layers divided by another method, with ridge routers."""
    stored = job.stages.load("divided")
    if stored is None:
        config = replace(job.config, method=method, router="ridge")
        found = divide_layers(job.source.model, job.ffns, job.chunks, config, importance, job.observer)
        stored = _as_tensors(config.layers_of(len(job.ffns)), found), {}
        job.stages.save("divided", *stored)
    return list(_as_partitions(stored[0]).values())


def _as_tensors(layers: Sequence[int], partitions: Sequence[Partition]) -> dict[str, Tensor]:
    tensors = {}
    for layer, partition in zip(layers, partitions, strict=True):
        tensors[f"labels.{layer}"] = partition.labels_F
        if partition.router_NH is not None:
            tensors[f"router.{layer}"] = partition.router_NH.detach()
    return tensors


def _as_partitions(tensors: dict[str, Tensor]) -> dict[int, Partition]:
    layers = sorted(int(name.removeprefix("labels.")) for name in tensors if name.startswith("labels."))
    return {layer: Partition(tensors[f"labels.{layer}"], tensors.get(f"router.{layer}")) for layer in layers}


def finetune_model(job: Job) -> None:
    """Fine-tune the converted model within the budget, whose number of steps config.json has from the start.

    Raises:
        ValueError: the model is no causal language model on text.
    """
    config = job.config
    if not config.minutes:
        return
    if job.corpus is None or not job.source.causal:
        raise ValueError(
            f"{job.source.name} does not predict text: fine-tuning (minutes={config.minutes}) needs that"
        )
    job.ranks.check_batch(config.batch)
    dense = job.reopen()
    if "finetune_steps" not in job.about:
        few_NL = training_chunks(job, 64)
        steps = plan_steps(
            job.source.model, dense, few_NL, minutes=config.minutes, config=config, ranks=job.ranks
        )
        job.remember(finetune_steps=min(MOST_STEPS, steps))
    steps = job.about["finetune_steps"]
    chunks_NL = training_chunks(job, steps * config.batch)
    teacher = _teacher(job, dense, chunks_NL)
    del dense
    finetune(
        job.source.model,
        chunks_NL,
        teacher,
        steps=steps,
        config=config,
        checkpoint=job.stages.path("finetune"),
        observer=job.observer,
        records=job.records,
        ranks=job.ranks,
    )


def _teacher(job: Job, dense: nn.Module, chunks_NL: Tensor) -> Teacher:
    """The dense model's states, from their stage file where it is; each process computes its part of them."""
    ranks, path = job.ranks, job.stages.path("teacher")
    if path is None or (ranks.size == 1 and not path.exists()):
        teacher = Teacher.of(dense, chunks_NL, job.observer)
        if path is not None:
            teacher.save(path)
        return teacher
    ranks.wait()  # the file appears only when all have looked for it
    there = path.exists()
    ranks.wait()
    if not there:
        parts = [path.with_name(f"teacher-{rank}.safetensors") for rank in range(ranks.size)]
        mine_NL = chunks_NL.split(-(-len(chunks_NL) // (BATCH * ranks.size)) * BATCH)[
            ranks.rank : ranks.rank + 1
        ]
        for part_NL in mine_NL:  # none for the last of many processes
            Teacher.of(dense, part_NL, job.observer).save(parts[ranks.rank])
        ranks.wait()
        if ranks.first:
            head = Head.of(dense)
            states = [Teacher.load(part, head).states_NLH for part in parts if part.exists()]
            Teacher(torch.cat(states), head).save(path)
            for part in parts:
                part.unlink(missing_ok=True)
        ranks.wait()
    return Teacher.load(path, Head.of(dense, chunks_NL[:1, :8]))


def training_chunks(job: Job, count: int) -> Tensor:
    """The first ``count`` sequences (N, L) of the training order."""
    assert job.corpus is not None
    return torch.stack(list(islice(job.corpus.training_order(job.config.seed), count)))
