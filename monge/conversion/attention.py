"""Refit of the projection by which attention writes into the residual stream, in front of each FFN.

Attention reads what the converted layers before it wrote. Its output projection is linear, so it can make up
for part of what they lost in the same way as the FFN's, by ridge regression, at no cost at run time.

    the converted stream up to the FFN --> refit --> [Replay] --> its pass through the whole layer

Shapes: N sequences, L tokens in each, T = N L, A inputs of the projection, H model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from monge.conversion.calibrate import BATCH_TOKENS, Streams
from monge.conversion.linear import is_linear, read_linear, shape_of, write_linear
from monge.conversion.refit import Refit, refit_down, token_weights
from monge.conversion.types import FFN


class _Enough(Exception):
    """Raised where the FFN begins: the rest of the layer is not needed."""


@dataclass(frozen=True)
class Replay:
    """What spares the next pass of the converted stream through a layer its attention.

    Attributes:
        projection: the last linear map onto the residual stream before the FFN.
        inputs_TA: what it was given.
        block: the child of the layer that holds the projection and returns its output as it is; None if there
            is none.
        extras: how many times None ``block`` returns after that output; None if it returns a tensor alone.
    """

    projection: nn.Module
    inputs_TA: Tensor
    block: nn.Module | None
    extras: int | None

    @contextmanager
    def within(self) -> Iterator[None]:
        """Within it the layer, run over the same stream in batches of any size, applies the projection to
        what it was given before. Without a ``block`` attention is computed anew.
        """
        if self.block is None:
            yield
            return
        done = 0

        def replay(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            shape = (args[0] if args else kwargs["hidden_states"]).shape[:-1]
            part = slice(done, done + shape.numel())
            done = part.stop
            output_BLH = self.projection(self.inputs_TA[part].unflatten(0, shape))
            return output_BLH if self.extras is None else (output_BLH, *(None,) * self.extras)

        with _forward_of(self.block, replay):
            yield


def refit_attention(
    streams: Streams, ffn: FFN, drift_TH: Tensor, held_out_T: Tensor, alpha: float
) -> tuple[Refit, Replay] | None:
    """Refit the last projection before the FFN of a layer, on the converted stream, in place.

    The target is its own output plus ``alpha`` times the drift of the residual stream; see `refit_down`.

    Args:
        drift_TH: dense minus converted residual before the layer, in units of the projection's output.
        held_out_T: bool, the tokens that choose lambda.
        alpha: share of the drift to undo.

    Returns:
        What became of it, and what the next pass need not compute; None where the layer has no linear map
        onto the residual stream before its FFN.
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
    return refit, Replay(projection, inputs_TA, *_block_of(streams, ffn, projection))


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
    stream_NLH = streams.converted_NLH
    outputs, inputs = shape_of(projection)
    tokens, done = stream_NLH.shape[:2].numel(), 0
    inputs_TA, y_TH = stream_NLH.new_empty(tokens, inputs), stream_NLH.new_empty(tokens, outputs)

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal done
        part = slice(done, done + output.shape[:-1].numel())
        inputs_TA[part], y_TH[part] = args[0].flatten(0, -2), output.flatten(0, -2)
        done = part.stop

    handle = projection.register_forward_hook(note)
    try:
        for batch in stream_NLH.split(max(1, BATCH_TOKENS // stream_NLH.shape[1])):
            _run_to_ffn(streams, ffn, batch)
    finally:
        handle.remove()
    return inputs_TA, y_TH


def _block_of(streams: Streams, ffn: FFN, projection: nn.Module) -> tuple[nn.Module | None, int | None]:
    """``block`` and ``extras`` of `Replay`, found out on one sequence."""
    projected: list[Tensor] = []
    found: list[tuple[nn.Module, int | None]] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        projected.append(output)

    def compare(block: nn.Module, _: Any, output: Any) -> None:
        first, *others = output if isinstance(output, tuple) else (output,)
        same = isinstance(first, Tensor) and first.data_ptr() == projected[-1].data_ptr()
        if same and first.shape == projected[-1].shape and all(other is None for other in others):
            found.append((block, len(others) if isinstance(output, tuple) else None))

    with ExitStack() as hooks:
        hooks.callback(projection.register_forward_hook(note).remove)
        for child in streams.layers[ffn.layer].children():
            if child is not projection and projection in child.modules():
                hooks.callback(child.register_forward_hook(compare).remove)
        _run_to_ffn(streams, ffn, streams.converted_NLH[:1])
    return found[0] if len(found) == 1 else (None, None)


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


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within it the module runs ``forward`` instead of its own."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
