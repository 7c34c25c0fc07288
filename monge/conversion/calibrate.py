"""The residual streams of the dense and of the converted model, one layer at a time.

    tokens --> inputs of layer 0 --> [observe: what FFN l sees] --> convert FFN l --> [advance] --> layer l+1

Only the two streams (N, L, H) and the observation of one layer are in memory, whatever the number of layers.
One model serves both: a layer is run on the two streams first, then its FFN is replaced.

Most layers add their FFN to the residual, ``out = r + m y``, with a fixed factor m (1, or Granite's
residual_multiplier): then the residual is ``out - m y`` and the converted stream moves on by arithmetic.
Whether a layer is such is measured, not assumed. Others (BERT's LayerNorm after the sum, Gemma 2's after the
FFN) are run again once their FFN is replaced.

Shapes: N sequences, L tokens in each, B sequences of a batch, T = N L, H model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.ffn import layers_of
from monge.conversion.linear import shape_of
from monge.conversion.on_disk import in_memory
from monge.conversion.types import FFN
from monge.workspace.finite import all_finite

BATCH_TOKENS = 1024  # of one pass through a layer; larger activations leave the caches and cost a fifth more
AFFINE_TOLERANCE = 1e-3  # relative error of out = r + m y above which a layer is run again


@dataclass(frozen=True)
class Observation:
    """What the FFN of one layer is given, and what its conversion should make good.

    Attributes:
        x_TH: inputs of the FFN in the converted model.
        y_TH: outputs of the dense FFN for them.
        hidden_TF: its activations in between.
        drift_TH: dense minus converted residual beside y, in units of y; None where y is not simply added.
        residual_NLH: r of the converted stream, where ``out = r + m y``.
        factor: m, or None.
    """

    x_TH: Tensor
    y_TH: Tensor
    hidden_TF: Tensor
    drift_TH: Tensor | None
    residual_NLH: Tensor | None
    factor: float | None


@dataclass
class Streams:
    """Where the two models stand after ``layer`` layers; ``calls`` are the other arguments of each layer."""

    layers: nn.ModuleList
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    dense_NLH: Tensor
    converted_NLH: Tensor
    layer: int = 0


def start_streams(model: nn.Module, ffns: Sequence[FFN], chunks: Tensor) -> Streams:
    """The streams before layer 0.

    Args:
        chunks: inputs of the model, all of one size and without padding: token ids (N, L), or images.

    Raises:
        ValueError: hidden states are NaN or infinite.
    """
    layers = layers_of(model, ffns)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    cacheless = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    try:
        model(chunks[:1], **cacheless)  # one sequence: its masks and positions broadcast over a batch
    finally:
        for handle in handles:
            handle.remove()
    with in_memory(layers[0]):  # which is called with every batch
        dense_NLH = torch.cat(list(_inputs_of_first(model, layers, chunks)))
    check_finite(dense_NLH, "the embedding")
    return Streams(layers, calls, dense_NLH, dense_NLH.clone())


def observe(
    streams: Streams, ffn: FFN, between: Callable[[Tensor], AbstractContextManager[None]] | None = None
) -> Observation:
    """Run the layer of ``ffn``, still dense, on both streams; the dense stream moves past it.

    Args:
        between: is called after the dense stream's pass and before the converted one's, with the drift (T, H)
            of the residual before the layer in units of y; the latter runs within what it returns. Not called
            where y is not simply added.

    Raises:
        ValueError: an activation is NaN or infinite.
    """
    factor = _factor(streams, ffn)
    before_NLH = streams.dense_NLH
    dense_NLH, x_dense_TH, y_dense_TH = _run(streams, ffn, before_NLH)
    context: AbstractContextManager[None] = nullcontext()
    if between is not None and factor is not None:
        context = between(((before_NLH - streams.converted_NLH) / factor).flatten(0, 1))
    neurons = shape_of(ffn.down_module)[1]
    hidden_TF = before_NLH.new_empty((before_NLH.shape[:2].numel(), neurons))
    with context:
        out_NLH, x_TH, y_TH = _run(streams, ffn, streams.converted_NLH, hidden_TF)
    del context  # and what it keeps of the stream
    check_finite(dense_NLH, f"layer {ffn.layer}")
    check_finite(out_NLH, f"layer {ffn.layer} of the converted model")
    streams.dense_NLH = dense_NLH
    if factor is None:
        # where the FFN's two halves stand in two modules (BERT), its residual is its own input
        split = ffn.input_module is not ffn.output_module
        drift_TH = x_dense_TH - x_TH if split else None
        return Observation(x_TH, y_TH, hidden_TF, drift_TH, None, None)
    residual_NLH = out_NLH.sub_(y_TH.view_as(out_NLH), alpha=factor)
    drift_TH = (dense_NLH.view_as(y_TH) - residual_NLH.view_as(y_TH)).div_(factor).sub_(y_dense_TH)
    return Observation(x_TH, y_TH, hidden_TF, drift_TH, residual_NLH, factor)


def advance(streams: Streams, ffn: FFN, seen: Observation, y_TH: Tensor) -> None:
    """Move the converted stream past the layer, whose FFN now gives ``y_TH`` (T, H) for ``seen.x_TH``."""
    if seen.factor is not None and seen.residual_NLH is not None:
        streams.converted_NLH = seen.residual_NLH.add_(y_TH.view_as(seen.residual_NLH), alpha=seen.factor)
    else:
        streams.converted_NLH = _run(streams, ffn, streams.converted_NLH)[0]
    streams.layer = ffn.layer + 1


def skip(streams: Streams, ffn: FFN) -> None:
    """Move both streams past a layer that stays dense."""
    streams.dense_NLH = _run(streams, ffn, streams.dense_NLH)[0]
    streams.converted_NLH = _run(streams, ffn, streams.converted_NLH)[0]
    streams.layer = ffn.layer + 1


def check_finite(hidden: Tensor, where: str) -> None:
    """Raise ValueError where hidden states are not finite."""
    if not all_finite(hidden):
        raise ValueError(
            f"activations after {where} are NaN or infinite: the checkpoint is damaged, or overflows in "
            f"{hidden.dtype}; check the dense model's own output on the same text"
        )


def _inputs_of_first(model: nn.Module, layers: nn.ModuleList, chunks: Tensor) -> Iterator[Tensor]:
    """The input of the first layer, batch by batch; nothing after it is computed."""
    inputs: list[Tensor] = []

    class Enough(Exception):
        pass

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        raise Enough

    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in chunks.split(max(1, BATCH_TOKENS // max(chunks[0].numel(), 1))):
            with suppress(Enough):
                model(batch)
            yield inputs.pop()
    finally:
        handle.remove()


def _run(
    streams: Streams, ffn: FFN, stream_NLH: Tensor, hidden_TF: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output of the layer (N, L, H), inputs of its FFN (T, H), outputs of its FFN (T, H)).

    Args:
        hidden_TF: is filled with the activations of the FFN, which must still be dense.
    """
    args, kwargs = streams.calls[ffn.layer]
    out_NLH, x_NLH, y_NLH = (torch.empty_like(stream_NLH) for _ in range(3))
    size = max(1, BATCH_TOKENS // stream_NLH.shape[1])
    for start in range(0, len(stream_NLH), size):
        part = slice(start, start + size)
        hidden_BLF = None if hidden_TF is None else hidden_TF.view(*stream_NLH.shape[:2], -1)[part]
        with _watched(ffn, x_NLH[part], y_NLH[part], hidden_BLF):
            out = streams.layers[ffn.layer](stream_NLH[part], *args, **kwargs)
        out_NLH[part] = out[0] if isinstance(out, tuple) else out
    return out_NLH, x_NLH.flatten(0, 1), y_NLH.flatten(0, 1)


@contextmanager
def _watched(ffn: FFN, x_BLH: Tensor, y_BLH: Tensor, hidden_BLF: Tensor | None) -> Iterator[None]:
    """Copies the FFN's next input, output and activations into ``x_BLH``, ``y_BLH`` and ``hidden_BLF``."""

    def into(wanted: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            wanted.copy_(args[0].view_as(wanted))

        return keep

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        y_BLH.copy_(output.view_as(y_BLH))

    handles = [
        ffn.input_module.register_forward_pre_hook(into(x_BLH)),
        ffn.output_module.register_forward_hook(after),
    ]
    if hidden_BLF is not None:
        handles.append(ffn.down_module.register_forward_pre_hook(into(hidden_BLF)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _factor(streams: Streams, ffn: FFN) -> float | None:
    """m of ``out = r + m y``, measured on one sequence, or None where the layer is not of that form."""
    probe_NLH = streams.dense_NLH[:1]
    whole_NLH, _, y_TH = _run(streams, ffn, probe_NLH)
    handle = ffn.output_module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    try:
        bare_NLH, _, _ = _run(streams, ffn, probe_NLH)
    finally:
        handle.remove()
    y, difference = y_TH.flatten().double(), (whole_NLH - bare_NLH).flatten().double()
    factor = float(difference @ y / (y @ y).clamp_min(1e-300))
    affine = bool((difference - factor * y).norm() <= AFFINE_TOLERANCE * difference.norm())
    return factor if affine and factor != 0 else None
