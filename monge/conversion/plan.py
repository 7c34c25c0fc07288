"""What a conversion will do and cost, told before it starts.

Parameters are counted exactly, each tensor once, padding and routers included. Time and memory are estimates:
time from the floating-point work of the closed form at the speed of a matrix product measured here.

Shapes: T tokens, H model width, F neurons of the dense FFN, N routed experts, I neurons of the largest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from monge.conversion.config import ConvertConfig
from monge.conversion.on_disk import largest_layer, layers_on_disk
from monge.conversion.refit import LAMBDAS
from monge.conversion.source import Source
from monge.conversion.types import FFN, ExpertShape, FFNWeights

REFIT_TOKENS = 8_192
"""Calibration tokens with which the refit of a real model helps (at F = 1536; with 1,024 it does harm)."""
REFIT_RATIO = 4
"""Tokens per neuron that are enough in a smaller model."""
STATIC = "static"

EFFICIENCY = 0.5  # of a matrix product's speed that whole layers reach (measured on SmolLM2, float32)
PASSES = 3  # of every layer over the calibration tokens: dense, observed, converted
ALIGN_PASSES = 4  # of a training step: teacher, forward, and a backward of two
ROUNDS = 12  # of partitioning, at most
BASE_BYTES = 450_000_000  # Python, torch and transformers themselves
LAYERS_HELD = 4  # of a model on disk: dense, converted, mapped from their file, or as bytes to write
FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Plan:
    """The conversion, in numbers.

    Attributes:
        name: of the source.
        layers: those converted, of ``layer_count``.
        shape: how the FFN of the first of them is divided.
        padding: neurons of value zero that fill up the smaller experts, in all layers together.
        ffn_active: share of the model's FFN neurons that a token uses, layers that stay dense included.
        params_dense, params_total, params_active: parameters of the source, of the converted model, and of
            that those that a token uses (all but the routed experts it does not go to).
        flops_dense, flops: floating-point operations per token, without attention scores.
        seconds: estimate, fine-tuning included.
        peak_memory_bytes: estimate.
    """

    name: str
    method: str
    layers: tuple[int, ...]
    layer_count: int
    shape: ExpertShape
    padding: int
    ffn_active: float
    params_dense: int
    params_total: int
    params_active: int
    flops_dense: int
    flops: int
    seconds: float
    peak_memory_bytes: int

    @property
    def model_active(self) -> float:
        """Share of the source's parameters that a token uses."""
        return self.params_active / self.params_dense

    def lines(self) -> list[str]:
        """The plan for people."""
        shape = self.shape
        if self.method == STATIC:
            kept = f"the {_kept(shape)} strongest neurons of {shape.neurons} stay"
        else:
            shared = f"a shared expert of {shape.shared_neurons} neurons and " if shape.shared else ""
            kept = (
                f"{shape.neurons} neurons become {shared}{shape.routed} experts of {shape.expert_neurons}, "
                f"{shape.top_k} of them per token"
            )
            kept += f" ({self.padding} neurons of padding in all)" if self.padding else ""
        return [
            f"{self.name}: {len(self.layers)} of {self.layer_count} layers by {self.method}; {kept}.",
            f"Active per token: {self.ffn_active:.1%} of the FFN neurons, {self.model_active:.1%} of all "
            f"parameters ({_si(self.params_active)} of {_si(self.params_dense)}; {_si(self.params_total)} "
            f"stored), {_si(self.flops)}FLOP instead of {_si(self.flops_dense)}FLOP.",
            f"Estimated: {_duration(self.seconds)}, peak memory {self.peak_memory_bytes / 1e9:.1f} GB.",
        ]


def make_plan(
    source: Source, ffns: Sequence[FFN], config: ConvertConfig, *, flops_per_second: float | None = None
) -> Plan:
    """Plan the conversion of ``source``; its FFNs are ``ffns``.

    Args:
        flops_per_second: of a matrix product; measured when None (a fraction of a second).

    Raises:
        ValueError: the model does not allow what ``config`` asks for: fewer neurons than experts, a layer it
            does not have, sequences longer than its positions, or too few tokens for the refit.

    Examples:
        >>> from monge.conversion import ConvertConfig
        >>> from monge.conversion.plan import make_plan
        >>> plan = make_plan(source, find_ffns(source.model), ConvertConfig())  # doctest: +SKIP
        >>> print("\\n".join(plan.lines()))  # doctest: +SKIP
    """
    chosen = set(config.layers_of(len(ffns)))
    model: nn.Module = source.model
    total = active = dense = sum(parameter.numel() for parameter in model.parameters())
    neurons, used = 0, 0.0
    shapes: list[ExpertShape] = []
    work, widest = 0.0, 0
    for ffn in ffns:
        weights = ffn.read()
        F, H = weights.up_FH.shape
        neurons += F
        if ffn.layer not in chosen:
            used += F
            continue
        shapes.append(shape := config.shape_for(F, ffn.layer))
        stored, per_expert = _converted_parameters(weights, shape, config.method)
        change = stored - _dense_parameters(weights)
        total += change
        active += change - per_expert * (shape.routed - shape.top_k)
        used += _used(shape, config.method)
        work += _layer_work(shape, H, config)
        widest = max(widest, F)
    _check(source, widest, config)
    tables, head = _embeddings(model)
    flops_dense = 2 * (dense - tables)
    work += PASSES * (flops_dense - 2 * head) * config.tokens
    if config.aligns:
        work += ALIGN_PASSES * flops_dense * config.align_steps * config.batch * config.length
    speed = flops_per_second or measure_speed()
    return Plan(
        name=source.name,
        method=config.method,
        layers=tuple(sorted(chosen)),
        layer_count=len(ffns),
        shape=shapes[0],
        padding=0 if config.method == STATIC else sum(map(_padding, shapes)),
        ffn_active=used / neurons,
        params_dense=dense,
        params_total=total,
        params_active=active,
        flops_dense=flops_dense,
        flops=flops_dense - 2 * (dense - active),
        seconds=work / (EFFICIENCY * speed) + 60 * config.minutes,
        peak_memory_bytes=_peak_memory(model, dense, total, widest, H, config),
    )


def measure_speed(seconds: float = 0.1) -> float:
    """Floating-point operations per second of a float32 matrix product, with all threads as they are set.

    One thread is timed and multiplied: on a busy machine threads that wait for each other say nothing.
    """
    threads, size = torch.get_num_threads(), 384
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.set_num_threads(1)
    try:
        best, end = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            began = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return threads * 2 * size**3 / best


def _check(source: Source, widest: int, config: ConvertConfig) -> None:
    if source.tokenizer is None:
        return
    positions = getattr(source.config, "max_position_embeddings", None)
    if positions is not None and config.length > positions:
        raise ValueError(f"length={config.length} exceeds the {positions} positions of {source.name}: lower")
    enough = min(REFIT_TOKENS, REFIT_RATIO * widest)
    if config.refit and config.tokens < enough:
        raise ValueError(
            f"tokens={config.tokens} are too few for the refit of FFNs of {widest} neurons, which with less "
            f"than {enough} does more harm than good: raise --tokens, or leave the refit out (--no-refit)"
        )


def _dense_parameters(weights: FFNWeights) -> int:
    tensors = (
        weights.up_FH, weights.down_HF, weights.gate_FH,
        weights.gate_bias_F, weights.up_bias_F, weights.down_bias_H,
    )  # fmt: skip
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _converted_parameters(weights: FFNWeights, shape: ExpertShape, method: str) -> tuple[int, int]:
    """Of the converted layer, and of one of its routed experts."""
    H = weights.up_FH.shape[1]
    inputs = 1 if weights.gate_FH is None else 2
    biased = any(b is not None for b in (weights.gate_bias_F, weights.up_bias_F, weights.down_bias_H))
    per_neuron = inputs * (H + biased) + H
    if method == STATIC:
        bias = 0 if weights.down_bias_H is None else H
        return (_dense_parameters(weights) - bias) // weights.neurons * _kept(shape) + bias, 0
    per_expert = shape.expert_neurons * per_neuron
    stored = shape.routed * (per_expert + H) + shape.shared_neurons * per_neuron + biased * H
    return stored, per_expert


def _used(shape: ExpertShape, method: str) -> float:
    """Neurons of the source that a token uses, on average over experts."""
    if method == STATIC:
        return _kept(shape)
    return shape.shared_neurons + (shape.neurons - shape.shared_neurons) * shape.top_k / shape.routed


def _kept(shape: ExpertShape) -> int:
    return round(shape.neurons * shape.active / shape.groups)


def _padding(shape: ExpertShape) -> int:
    return shape.routed * shape.expert_neurons - (shape.neurons - shape.shared_neurons)


def _layer_work(shape: ExpertShape, H: int, config: ConvertConfig) -> float:
    """FLOPs beside the passes: rounds of partitioning, Gram matrices, solutions of the refit."""
    T, F, N = config.tokens, shape.neurons, shape.routed
    rounds = ROUNDS * 4 * T * F * N
    router = 2 * T * H * H
    solve = 2 * (F**3 / 3 + 2 * F * F * H)  # float64, at half the speed
    refit = 2 * T * F * (F + H) + (len(LAMBDAS) + 1) * solve
    return rounds + router + (refit if config.refit else 0)


def _embeddings(model: nn.Module) -> tuple[int, int]:
    """Parameters that are looked up and not multiplied (not those of a tied head), and those of the head."""
    tables = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.pop(id(head.weight), None)
    return sum(table.numel() for table in tables.values()), 0 if head is None else head.weight.numel()


def _peak_memory(model: nn.Module, dense: int, total: int, F: int, H: int, config: ConvertConfig) -> int:
    """The largest of the closed form, of the evaluation beside the dense model, and of fine-tuning (AdamW).

    Converted layers take the place of the source's. The dense model is opened once more at the end, mapped
    from its file and copied. Of a model on disk there are some layers, in use and being written, and twice
    what lies outside of them.
    """
    T = config.tokens
    per_token = 4 * F + 7 * H  # activations and what is made of them; both residual streams
    closed_form = T * per_token * FLOAT + 5 * F * F * DOUBLE
    if on_disk := layers_on_disk(model):
        outside = dense - sum(p.numel() for layer in on_disk.values() for p in layer.parameters())
        return BASE_BYTES + 2 * outside * FLOAT + LAYERS_HELD * largest_layer(model) + closed_form
    work = max(closed_form, 2 * dense * FLOAT)
    if config.minutes:
        work = max(work, 4 * dense * FLOAT)  # dense weights, gradients and two moments
    return BASE_BYTES + max(dense, total) * FLOAT + work


def _si(number: float) -> str:
    """95123456 -> '95.1 M'."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
