"""Refit of the projection by which attention writes into the residual stream, in front of each FFN.

Attention reads what the converted layers before it wrote. Its output projection is linear, so it can make up
for part of what they lost in the same way as the FFN's, by ridge regression, at no cost at run time.

Shapes: N sequences, L tokens in each, T = N L, A inputs of the projection, H model width.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.calibrate import BATCH_TOKENS, Streams
from monge.conversion.linear import is_linear, read_linear, shape_of, write_linear
from monge.conversion.refit import Refit, refit_down, token_weights
from monge.conversion.types import FFN


class _Enough(Exception):
    """Raised where the FFN begins: the rest of the layer is not needed."""


def refit_attention(
    streams: Streams, ffn: FFN, drift_TH: Tensor, held_out_T: Tensor, alpha: float
) -> Refit | None:
    """Refit the last projection before the FFN of a layer, on the converted stream, in place.

    The target is its own output plus ``alpha`` times the drift of the residual stream; see `refit_down`.

    Args:
        drift_TH: dense minus converted residual before the layer, in units of the projection's output.
        held_out_T: bool, the tokens that choose lambda.
        alpha: share of the drift to undo.

    Returns:
        What became of it; None where the layer has no linear map onto the residual stream before its FFN.
    """
    projection = attention_projection(streams, ffn)
    if projection is None:
        return None
    inputs_TA, y_TH = _seen_by(streams, ffn, projection)
    old_HA, bias_H = read_linear(projection)
    if bias_H is not None:
        y_TH -= bias_H
    target_TH = y_TH + alpha * drift_TH
    refit = refit_down(inputs_TA, target_TH, token_weights(y_TH, target_TH), held_out_T, old_HA)
    write_linear(projection, refit.down_HF, bias_H)
    return refit


def put_attention(streams: Streams, ffn: FFN, weight_HA: Tensor) -> None:
    """Give the projection a weight that was fitted before."""
    projection = attention_projection(streams, ffn)
    assert projection is not None
    write_linear(projection, weight_HA, read_linear(projection)[1])


def attention_projection(streams: Streams, ffn: FFN) -> nn.Module | None:
    """The last linear map that a layer calls before its FFN, if it has as many outputs as the stream."""
    called: list[nn.Module] = []

    def note(module: nn.Module, _: Any) -> None:
        called.append(module)

    layer = streams.layers[ffn.layer]
    with ExitStack() as hooks:
        for module in layer.modules():
            if is_linear(module):
                hooks.callback(module.register_forward_pre_hook(note).remove)
        _run_to_ffn(streams, ffn, streams.dense_NLH[:1])
    width = streams.dense_NLH.shape[-1]
    return called[-1] if called and shape_of(called[-1])[0] == width else None


def _seen_by(streams: Streams, ffn: FFN, projection: nn.Module) -> tuple[Tensor, Tensor]:
    """(inputs (T, A), outputs (T, H)) of the projection on the converted stream."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0].flatten(0, -2))
        outputs.append(output.flatten(0, -2))

    handle = projection.register_forward_hook(note)
    try:
        for batch in streams.converted_NLH.split(max(1, BATCH_TOKENS // streams.converted_NLH.shape[1])):
            _run_to_ffn(streams, ffn, batch)
    finally:
        handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def _run_to_ffn(streams: Streams, ffn: FFN, batch_BLH: Tensor) -> None:
    def stop(*_: Any) -> None:
        raise _Enough

    handle = ffn.input_module.register_forward_pre_hook(stop)
    args, kwargs = streams.calls[ffn.layer]
    try:
        with suppress(_Enough):
            streams.layers[ffn.layer](batch_BLH, *args, **kwargs)
    finally:
        handle.remove()
