"""The problem of `dot_claim`: a small dense model trained on real text, and conversions of it.

Shapes: N windows, S context, T tokens, H model width, F neurons, C clusters.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.conversion.alignment import AlignmentConfig, NeuronMask, align, masked
from monge.conversion.ffn import find_ffns
from monge.conversion.importance import neuron_importance
from monge.conversion.partition import METHODS
from monge.conversion.router_fit import RidgeRouter, expert_energy
from monge.conversion.types import FFN, ExpertShape, LayerSample, Partition
from monge.lab.models import build_model
from monge.lab.optimisation import batch_of
from monge.lab.presets import CompareConfig
from monge.lab.tokenizer import load_corpus
from monge.lab.training import Run, train
from monge.workspace.records import Records
from monge.workspace.text import find_domains

FROM_LLOYD = "dot from ot_lloyd"
EVALUATED_AT_ONCE = 32  # windows


DENSE = CompareConfig(
    routers=("dense",), seeds=1, top_k=2, expert_width=256, steps=2500, warmup=100, eval_every=500
)
"""Two layers of width 96 with 512 neurons each, and a vocabulary of 1024."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the dense model, its text, and the budget of a conversion."""

    dense: CompareConfig = DENSE
    groups: int = 16
    calibration_windows: int = 64
    batch: int = 4
    steps: int = 300
    search_steps: int = 150


QUICK = Sizes(
    dense=CompareConfig(
        routers=("dense",), vocab=300, val_tokens=1024, layers=2, width=32, heads=2, context=32, top_k=2,
        expert_width=32, steps=40, warmup=5,
    ),
    groups=8,
    calibration_windows=16,
    steps=20,
    search_steps=10,
)  # fmt: skip
"""Sizes of a run that only shows that everything works."""


class Silence:
    """An observer of `monge.lab` that shows nothing."""

    def message(self, text: str) -> None:
        pass

    def step(self, *args: Any) -> None:
        pass


@dataclass(frozen=True)
class Cell:
    """One conversion: what is divided how, and trained how."""

    method: str
    active: float
    stage: str
    """untrained, frozen (partitions and routers learn) or trained (the weights too)."""
    seed: int
    rates: dict[str, float] = field(default_factory=dict)


class Problem:
    """The dense model, its text in three disjoint parts, and the conversions of it."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes = sizes
        corpus = load_corpus(find_domains(sizes.dense.text), sizes.dense)
        self.train_NS = corpus.train_NS
        self.selection_NS, self.evaluation_NS = corpus.val_NS.chunk(2)
        self.dense = build_model("dense", sizes.dense, 0)
        folder.mkdir(parents=True, exist_ok=True)
        paths = (Records(folder / "dense.jsonl"), folder / "dense.safetensors")
        train(self.dense, Run("dense", 0, sizes.dense, corpus, *paths, Silence()))
        self.dense.eval().requires_grad_(False)
        self._partitions: dict[tuple[str, float, int], tuple[list[Partition], float]] = {}

    @cached_property
    def dense_perplexity(self) -> dict[str, float]:
        """On the selection and on the evaluation text."""
        parts = {"selection": self.selection_NS, "evaluation": self.evaluation_NS}
        return {name: math.exp(self._measure(self.dense, part_NS)[0]) for name, part_NS in parts.items()}

    def shape(self, active: float) -> ExpertShape:
        neurons = find_ffns(self.dense)[0].read().neurons
        return ExpertShape(neurons, self.sizes.groups, round(active * self.sizes.groups), 0)

    def convert(self, cell: Cell, steps: int, text: str = "evaluation") -> dict[str, float]:
        """Perplexity, its ratio to the dense model's, KL to it (nats per token), and seconds."""
        model = copy.deepcopy(self.dense)
        ffns, shape = find_ffns(model), self.shape(cell.active)
        partitions, seconds = self._start(cell)
        began = time.perf_counter()
        if cell.stage != "untrained":
            partitions = self._train(model, ffns, shape, cell, partitions, steps)
        seconds += time.perf_counter() - began
        masks = [NeuronMask(partition, shape.top_k) for partition in partitions or []]
        with masked(ffns, masks):
            windows_NS = self.selection_NS if text == "selection" else self.evaluation_NS
            loss, kl = self._measure(model, windows_NS)
        perplexity = math.exp(loss)
        ratio = perplexity / self.dense_perplexity[text]
        return {"perplexity": perplexity, "ratio": ratio, "kl": kl, "seconds": seconds, "steps": steps}

    def _start(self, cell: Cell) -> tuple[list[Partition] | None, float]:
        """The method's partitions with ridge routers, and the seconds they took; made once."""
        if cell.method == "dot":
            return None, 0.0
        method = "ot_lloyd" if cell.method == FROM_LLOYD else cell.method
        key = (method, cell.active, cell.seed)
        if key not in self._partitions:
            began = time.perf_counter()
            shape, entry = self.shape(cell.active), METHODS[method]
            samples = self._samples(self.dense, cell.seed)
            if entry.needs_gradients:
                chunks_BL = self._calibration(cell.seed)
                found = neuron_importance(
                    self.dense, find_ffns(self.dense), chunks_BL, shape.routed, cell.seed
                )
                samples = [replace(s, importance_CF=i) for s, i in zip(samples, found)]
            assert entry.function is not None
            partitions = [entry.function(sample, shape, cell.seed) for sample in samples]
            if not entry.dense:
                partitions = [_with_ridge(s, p, shape) for s, p in zip(samples, partitions)]
            self._partitions[key] = partitions, time.perf_counter() - began
        return self._partitions[key]

    def _train(
        self,
        model: nn.Module,
        ffns: list[FFN],
        shape: ExpertShape,
        cell: Cell,
        partitions: list[Partition] | None,
        steps: int,
    ) -> list[Partition]:
        learned = cell.method in ("dot", FROM_LLOYD)
        chunks = [batch_of(self.train_NS, self.sizes.batch, cell.seed, step)[:, :-1] for step in range(steps)]
        aligned = align(
            model,
            ffns,
            chunks,
            [shape] * len(ffns),
            partitions=partitions,
            config=AlignmentConfig(learn_partition=learned, **cell.rates),
            steps=steps,
            seed=cell.seed,
        )
        return aligned.partitions

    def _calibration(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train_NS), generator=generator)
        return self.train_NS[order[: self.sizes.calibration_windows], :-1]

    @torch.no_grad()
    def _samples(self, model: nn.Module, seed: int) -> list[LayerSample]:
        """What each FFN of ``model`` sees on the calibration text."""
        ffns = find_ffns(model)
        inputs: list[Tensor] = []
        handles = [
            ffn.input_module.register_forward_pre_hook(
                lambda module, args: inputs.append(args[0].detach().flatten(0, -2))
            )
            for ffn in ffns
        ]
        try:
            model(input_ids=self._calibration(seed))
        finally:
            for handle in handles:
                handle.remove()
        samples = []
        for ffn, x_TH in zip(ffns, inputs):
            weights = ffn.read()
            samples.append(LayerSample(ffn.layer, weights, x_TH, weights.hidden(x_TH), torch.ones(len(x_TH))))
        return samples

    @torch.no_grad()
    def _measure(self, model: nn.Module, windows_NS: Tensor) -> tuple[float, float]:
        """Cross-entropy and KL(dense || model), nats per token."""
        loss, kl, tokens = 0.0, 0.0, windows_NS[:, 1:].numel()
        for window_NS in windows_NS.split(EVALUATED_AT_ONCE):
            ids_NS, next_NS = window_NS[:, :-1], window_NS[:, 1:]
            log_q = model(input_ids=ids_NS).logits.log_softmax(-1).flatten(0, 1)
            log_p = self.dense(input_ids=ids_NS).logits.log_softmax(-1).flatten(0, 1)
            loss += float(nnf.nll_loss(log_q, next_NS.flatten(), reduction="sum"))
            kl += float(nnf.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        return loss / tokens, kl / tokens


def _with_ridge(sample: LayerSample, partition: Partition, shape: ExpertShape) -> Partition:
    """The partition with the ridge router that every method starts from."""
    energy_TN = expert_energy(sample, partition.labels_F, shape.routed)
    return replace(partition, router_NH=RidgeRouter(sample.x_TH).fit(energy_TN.sqrt()))
