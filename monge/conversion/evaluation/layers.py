"""Every layer by itself: the error of its FFN on its own inputs, the load of its experts, the oracle.

    converted model runs --> x, y of every FFN --> dense FFN on the same x --> relative error

The oracle keeps, for every token, the neurons that matter most to that token: what a router that knew the
activations could reach with the same number of neurons, their weights being as they are.

Shapes: N chunks, L tokens of a chunk, T tokens, H model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.conversion.ffn import find_ffns
from monge.conversion.observer import Observer, Silent
from monge.conversion.types import FFN, FFNWeights
from monge.hf.blocks import SparseBlock, counted_loads, find_blocks

ORACLE_EVERY = 4  # one token in so many; choosing the best neurons of a token takes longer than the FFN


@dataclass(frozen=True)
class LayerQuality:
    """One FFN of the converted model beside the dense one.

    Attributes:
        layer: counted from 0.
        error: ``sum_t |y(x_t) - y_dense(x_t)|^2 / sum_t |y_dense(x_t)|^2``, x of the converted stream.
        oracle: the same for the best neurons of each token, as many as the layer uses, over every fourth
            token; None for a dense FFN.
        load: slots on each routed expert, empty for a dense FFN.
    """

    layer: int
    error: float
    oracle: float | None
    load: list[int]

    @property
    def dead(self) -> int:
        """Routed experts that no token took."""
        return self.load.count(0)


@torch.no_grad()
def measure_layers(
    dense: nn.Module,
    converted: nn.Module,
    chunks_NL: Tensor,
    *,
    shares: Mapping[int, float] | None = None,
    batch: int = 1,
    observer: Observer | None = None,
) -> list[LayerQuality]:
    """Compare every FFN of ``converted`` with that of ``dense`` on what flows through the converted model.

    Args:
        dense, converted: models of transformers with the same layers.
        chunks_NL: int64 token ids.
        shares: layer -> share of the dense neurons that the oracle may use (`active_shares`); layers that are
            not named get no oracle.
        batch: chunks in a forward.
        observer: is told of every batch.

    Raises:
        ValueError: a layer of ``dense`` has no counterpart in ``converted``.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from monge.conversion.evaluation import measure_layers
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> [layer.error < 1e-12 for layer in measure_layers(model, model, torch.arange(40).view(4, 10))]
        [True, True]
    """
    converted.eval()
    observer = observer or Silent()
    device = next(converted.parameters()).device
    with watched_layers(dense, converted, shares) as layers:
        for ids_BL in chunks_NL.split(batch):
            _run(converted, ids_BL.to(device))
            observer.advance(len(ids_BL))
    return layers


@contextmanager
def watched_layers(
    dense: nn.Module, converted: nn.Module, shares: Mapping[int, float] | None = None
) -> Iterator[list[LayerQuality]]:
    """`measure_layers` of whatever ``converted`` is run on meanwhile; the list is filled at the end.

    For figures that come with forwards which are made anyway.
    """
    pairs = [
        _Pair(ffn, *_counterpart(dense, ffn, converted), (shares or {}).get(ffn.layer))
        for ffn in find_ffns(dense)
    ]
    hooks = [hook for pair in pairs for hook in pair.attach()]
    layers: list[LayerQuality] = []
    try:
        with counted_loads(converted) as loads:
            yield layers
        layers += [pair.result(loads) for pair in pairs]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def oracle(model: nn.Module, shares: Mapping[int, float]) -> Iterator[None]:
    """The FFNs of the dense ``model`` use for each token the best neurons of that token alone meanwhile.

    Best are the neurons of largest ``|h_f| |column f of Wd|``: each by itself changes the output the most.

    Args:
        model: a dense model.
        shares: layer -> share of its neurons; layers that are not named, or have 1, stay as they are.

    Raises:
        ValueError: a share is not in (0, 1], or the model has no FFN that can be found.
    """
    if wrong := {layer: share for layer, share in shares.items() if not 0 < share <= 1}:
        raise ValueError(f"shares must be in (0, 1], got {wrong}")
    used = [(ffn, shares.get(ffn.layer, 1.0)) for ffn in find_ffns(model)]
    hooks = [hook for ffn, share in used if share < 1 for hook in _replace(ffn, share)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def oracle_output(weights: FFNWeights, x_TH: Tensor, share: float) -> Tensor:
    """(T, H): the FFN with, for each token, its ``round(share F)`` best neurons, at least one."""
    return _best_neurons(weights, weights.hidden(x_TH), share)


def _best_neurons(weights: FFNWeights, hidden_TF: Tensor, share: float) -> Tensor:
    keep = max(1, round(share * weights.neurons))
    best_TK = (hidden_TF.abs() * weights.down_HF.norm(dim=0)).topk(keep, dim=1).indices
    kept_TF = torch.zeros_like(hidden_TF).scatter(1, best_TK, hidden_TF.gather(1, best_TK))
    return nnf.linear(kept_TF, weights.down_HF, weights.down_bias_H)


@dataclass
class _Pair:
    """An FFN of the dense model and what stands in its place; sums over tokens in float64."""

    ffn: FFN
    entrance: nn.Module
    exit: nn.Module
    block: SparseBlock | None
    share: float | None
    x: list[Tensor] = field(default_factory=list)
    wrong: float = 0.0
    size: float = 0.0
    wrong_oracle: float = 0.0
    size_oracle: float = 0.0

    def attach(self) -> Iterator[Any]:
        yield self.entrance.register_forward_pre_hook(self._keep_input)
        yield self.exit.register_forward_hook(self._compare)

    def _keep_input(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.x = [arguments[0].detach()]

    def _compare(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        x = self.x.pop()
        y = output[0] if isinstance(output, tuple) else output
        if self.block is not None and self.block.beside is not None:
            y = y + self.block.beside(x)
        with self.ffn.in_memory():
            weights = self.ffn.read().to(x.device)
        x_TH, y_TH = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
        hidden_TF = weights.hidden(x_TH)
        dense_TH = nnf.linear(hidden_TF, weights.down_HF, weights.down_bias_H)
        self.size += _energy(dense_TH)
        self.wrong += _energy(y_TH - dense_TH)
        if self.share is not None:
            few_TF, few_TH = hidden_TF[::ORACLE_EVERY], dense_TH[::ORACLE_EVERY]
            self.size_oracle += _energy(few_TH)
            self.wrong_oracle += _energy(_best_neurons(weights, few_TF, self.share) - few_TH)

    def result(self, loads: Mapping[int, Tensor]) -> LayerQuality:
        error = _ratio(self.wrong, self.size)
        oracle_error = None if self.share is None else _ratio(self.wrong_oracle, self.size_oracle)
        load = loads[self.ffn.layer].tolist() if self.block is not None else []
        return LayerQuality(self.ffn.layer, error, oracle_error, load)


def _counterpart(
    dense: nn.Module, ffn: FFN, converted: nn.Module
) -> tuple[nn.Module, nn.Module, SparseBlock | None]:
    """Where the FFN begins and ends in ``converted``: at the same paths, or its layer's mixture block."""
    blocks = {block.layer: block for block in find_blocks(converted)}
    block = blocks.get(ffn.layer)
    paths = {module: name for name, module in dense.named_modules()}
    present = dict(converted.named_modules())
    entrance, exit_ = paths[ffn.input_module], paths[ffn.output_module]
    if entrance in present and exit_ in present:
        return present[entrance], present[exit_], block
    if block is None:
        raise ValueError(
            f"the converted model has nothing in the place of {ffn.name}: compare a model with the dense one "
            "that it was converted from"
        )
    return block.block, block.block, block


def _replace(ffn: FFN, share: float) -> Iterator[Any]:
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[:] = [arguments[0]]

    def best_neurons(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs.pop()
        weights = ffn.read().to(x.device)
        y_TH = oracle_output(weights, x.reshape(-1, x.shape[-1]).float(), share)
        return y_TH.reshape(output.shape).to(output.dtype)

    yield ffn.input_module.register_forward_pre_hook(keep_input)
    yield ffn.output_module.register_forward_hook(best_neurons)


def _run(model: nn.Module, ids_BL: Tensor) -> None:
    """A forward for its hooks alone: of the model below the head, where there is one."""
    getattr(model, "base_model", model)(input_ids=ids_BL)


def _energy(y_TH: Tensor) -> float:
    return float(y_TH.square().sum(dtype=torch.float64))


def _ratio(wrong: float, size: float) -> float:
    return wrong / max(size, torch.finfo(torch.float64).tiny)
