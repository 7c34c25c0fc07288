"""The closed-form conversion of a model: layer after layer, each on what the layers before it really give.

    streams --> observe --> convert_layer --> install --> advance --> [stage files] --> next layer

A layer that lies on disk is read for its turn, and what it became is written for the layer to be read from.

Shapes: N sequences, L tokens in each, H model width, C clusters of tokens, F neurons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.attention import put_attention, refit_attention
from monge.conversion.calibrate import Streams, advance, observe, skip, start_streams
from monge.conversion.config import ConvertConfig
from monge.conversion.layerwise import ALPHA, ConvertedLayer, convert_layer, divide_layer, held_out
from monge.conversion.observer import Observer
from monge.conversion.on_disk import keep
from monge.conversion.refit import Refit
from monge.conversion.stages import Stages
from monge.conversion.types import FFN, Partition
from monge.moe.compute.float32_products import fast_float32

STREAMS = "streams"


@torch.no_grad()
def divide_layers(
    model: nn.Module,
    ffns: Sequence[FFN],
    chunks: Tensor,
    config: ConvertConfig,
    importance: Mapping[int, Tensor],
    observer: Observer,
) -> list[Partition]:
    """Partition and start router of every layer to convert, on the dense model, which stays as it is."""
    streams = start_streams(model, ffns, chunks)
    wanted = set(config.layers_of(len(ffns)))
    observer.stage("divide", len(ffns))
    partitions = []
    for ffn in ffns:
        if ffn.layer in wanted:
            seen, weights = observe(streams, ffn), ffn.read()
            partitions.append(
                divide_layer(seen, weights, config, layer=ffn.layer, importance_CF=importance.get(ffn.layer))
            )
            streams.converted_NLH = streams.dense_NLH
        else:
            skip(streams, ffn)
        observer.advance()
    return partitions


@torch.no_grad()
def convert_layers(
    model: nn.Module,
    ffns: Sequence[FFN],
    chunks: Tensor,
    config: ConvertConfig,
    stages: Stages,
    *,
    gates: str,
    given: Mapping[int, Partition],
    importance: Mapping[int, Tensor],
    observer: Observer,
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Convert the layers of ``config.layers`` in place, going on from the stage files where there are any.

    Args:
        chunks: inputs of one size without padding.
        gates: of the deployed model, a name of `monge.conversion.building.GATE_SCALES`.
        given: partitions with routers that were found before, by layer; the others are computed.
        importance: (C, F) by layer, for methods that need gradients.
        record: takes the record of each layer.
    """
    wanted = set(config.layers_of(len(ffns)))
    streams = _resume(model, ffns, chunks, config, stages, gates)
    observer.stage("convert", len(ffns))
    observer.advance(streams.layer)
    for ffn in ffns[streams.layer :]:
        began = time.perf_counter()
        with ffn.in_memory():
            if ffn.layer in wanted:
                row = _convert(streams, ffn, config, stages, gates, given, importance)
                record({**row, "seconds": time.perf_counter() - began})
                note = f"error {row['error']:.3f}"
            else:
                skip(streams, ffn)
                note = "stays dense"
        stages.save(
            STREAMS,
            {"dense": streams.dense_NLH, "converted": streams.converted_NLH},
            {"layer": streams.layer},
        )
        observer.advance(1, note)


def _convert(
    streams: Streams,
    ffn: FFN,
    config: ConvertConfig,
    stages: Stages,
    gates: str,
    given: Mapping[int, Partition],
    importance: Mapping[int, Tensor],
) -> dict[str, Any]:
    """Convert one layer, write its stage files and move the streams past it; returns its record."""
    attention: dict[str, Tensor] = {}
    between = partial(_refit_attention, streams, ffn, attention) if config.refit else None
    with fast_float32():  # not around `advance`, which may run the layer's experts
        seen, weights = observe(streams, ffn, between), ffn.read()
        converted, y_TH = convert_layer(
            seen,
            weights,
            config,
            gates,
            layer=ffn.layer,
            sequence=streams.dense_NLH.shape[1],
            given=given.get(ffn.layer),
            importance_CF=importance.get(ffn.layer),
        )
    converted.install(ffn, gates)
    advance(streams, ffn, seen, y_TH)
    _save(stages, ffn, converted, attention)
    keep(streams.layers[ffn.layer], stages, _weights_name(ffn))
    return _described(ffn, converted)


def _resume(
    model: nn.Module,
    ffns: Sequence[FFN],
    chunks: Tensor,
    config: ConvertConfig,
    stages: Stages,
    gates: str,
) -> Streams:
    """The streams where an earlier start left them, the layers before them converted."""
    streams = start_streams(model, ffns, chunks)
    stored = stages.load(STREAMS)
    if stored is None:
        return streams
    tensors, about = stored
    streams.dense_NLH, streams.converted_NLH = tensors["dense"], tensors["converted"]
    streams.layer = about["layer"]
    wanted = set(config.layers_of(len(ffns)))
    for ffn in ffns[: streams.layer]:
        if ffn.layer in wanted:
            with ffn.in_memory():
                converted, attention_HA = _load(stages, ffn, config)
                if attention_HA is not None:
                    put_attention(streams, ffn, attention_HA)
                converted.install(ffn, gates)
                keep(streams.layers[ffn.layer], stages, _weights_name(ffn))
    return streams


def _refit_attention(
    streams: Streams, ffn: FFN, done: dict[str, Tensor], drift_TH: Tensor
) -> AbstractContextManager[None]:
    """Refit attention's projection; within what comes back, a pass through the layer has its inputs ready."""
    held_out_T = held_out(len(drift_TH), streams.dense_NLH.shape[1]).to(drift_TH.device)
    refitted = refit_attention(streams, ffn, drift_TH, held_out_T, ALPHA)
    if refitted is None:
        return nullcontext()
    refit, replay = refitted
    done["attention"] = refit.down_HF
    return replay.within()


def _save(stages: Stages, ffn: FFN, converted: ConvertedLayer, attention: dict[str, Tensor]) -> None:
    refit = converted.refit
    stages.save(
        f"layer-{ffn.layer:03d}",
        {
            "labels": converted.partition.labels_F,
            "router": converted.router_NH,
            "down": converted.weights.down_HF,
            "load": converted.load_N,
            **attention,
        },
        {"lam": refit.lam, "error": refit.error, "error_before": refit.error_before},
    )


def _weights_name(ffn: FFN) -> str:
    return f"weights-{ffn.layer:03d}"  # of a whole layer, where the model lies on disk


def _load(stages: Stages, ffn: FFN, config: ConvertConfig) -> tuple[ConvertedLayer, Tensor | None]:
    stored = stages.load(f"layer-{ffn.layer:03d}")
    if stored is None:
        raise ValueError(
            f"the stage file of layer {ffn.layer} is missing in {stages.folder}, later ones are there. "
            "Delete that folder to start from the beginning."
        )
    tensors, about = stored
    weights = ffn.read()
    converted = ConvertedLayer(
        weights=replace(weights, down_HF=tensors["down"]),
        partition=Partition(tensors["labels"]),
        router_NH=tensors["router"],
        shape=config.shape_for(weights.neurons, ffn.layer),
        refit=Refit(tensors["down"], about["lam"], about["error"], about["error_before"]),
        load_N=tensors["load"],
    )
    return converted, tensors.get("attention")


def _described(ffn: FFN, converted: ConvertedLayer) -> dict[str, Any]:
    refit = converted.refit
    return {
        "kind": "layer",
        "layer": ffn.layer,
        "error": refit.error,
        "error_before_refit": refit.error_before,
        "lam": refit.lam if math.isfinite(refit.lam) else None,
        "load": [round(float(load), 4) for load in converted.load_N],
    }
