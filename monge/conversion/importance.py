"""How much the loss depends on each neuron, for each cluster of tokens: what the `gradient` partition needs.

Shapes: N sequences of length L, batches of B sequences and T = B L tokens, V vocabulary, H model width,
F neurons, C clusters of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.conversion.observer import Observer, Silent
from monge.conversion.partition.balanced_kmeans import affinity, cluster_balanced
from monge.conversion.types import FFN

BATCH_TOKENS = 512
CLUSTERED_TOKENS = 2048
"""Tokens that the centroids are computed from; 16 per cluster where that is more."""


def neuron_importance(
    model: nn.Module,
    ffns: Sequence[FFN],
    chunks_NL: Tensor,
    clusters: int,
    seed: int = 0,
    *,
    observer: Observer | None = None,
) -> list[Tensor]:
    """``I_cf = mean |h_tf dl/dh_tf| over the tokens t of cluster c``, one (C, F) matrix per FFN.

    l is the sum of the next-token losses of the dense model, so that ``h dl/dh`` is, to first order, what
    leaving out neuron f at token t takes from it. h is recomputed from the FFN's input and
    ``dl/dh = dl/dy Wd``, both as soon as the backward pass reaches the FFN: beyond one batch's activations,
    memory holds the (C, F) sums only. No parameter gets a gradient.

    Each layer has clusters of its own, as in the paper: balanced k-means on the FFN's inputs at the first
    2,048 tokens (16 per cluster where that is more), then every token to its nearest centroid. Two passes:
    forward on those tokens, forward and backward on all.

    Args:
        model: a causal language model; ``model(input_ids=...).logits`` (B, L, V).
        ffns: of `find_ffns`, not yet replaced.
        chunks_NL: int64 token ids, all sequences of one length of at least 2.
        clusters: C; for the `gradient` partition the number of routed experts.
        seed: of the initial centroids.

    Returns:
        Float32, in the order of ``ffns``; a cluster that no token is nearest to has zeros.

    Raises:
        ValueError: fewer tokens than clusters, sequences too short, a model without next-token logits, or a
            loss that is not finite.

    Source: LLaMA-MoE-v2, arXiv 2411.15708; removal by first-order Taylor expansion, Molchanov et al.,
        arXiv 1611.06440.
    """
    if chunks_NL.ndim != 2 or chunks_NL.shape[1] < 2 or chunks_NL.dtype != torch.int64:
        raise ValueError(
            "chunks_NL must be int64 token ids (sequences, length) with a length of at least 2, "
            f"got {chunks_NL.dtype} {tuple(chunks_NL.shape)}"
        )
    if not 1 <= clusters <= chunks_NL.numel():
        raise ValueError(f"clusters must be in 1..{chunks_NL.numel()}, the number of tokens; got {clusters}")
    observer = observer or Silent()
    length = chunks_NL.shape[1]
    batches = chunks_NL.to(next(model.parameters()).device).split(max(1, BATCH_TOKENS // length))
    first = -(-max(CLUSTERED_TOKENS, 16 * clusters) // batches[0].numel())
    observer.stage("importance of neurons", len(batches))
    with _frozen(model):
        sums = _cluster_inputs(model, ffns, batches[:first], clusters, seed)
        for batch_BL in batches:
            with ExitStack() as hooks, torch.enable_grad():
                for ffn, layer_sums in zip(ffns, sums):
                    layer_sums.attach(ffn, hooks.enter_context)
                _loss(model, batch_BL).backward()
            observer.advance()
    return [layer_sums.mean() for layer_sums in sums]


class _Sums:
    """Sums of ``|h dL/dh|`` over the tokens next to each centroid, for one FFN."""

    def __init__(self, centroids_CH: Tensor, neurons: int) -> None:
        self.centroids_CH = centroids_CH
        self.sum_CF = centroids_CH.new_zeros(len(centroids_CH), neurons, dtype=torch.float64)
        self.count_C = centroids_CH.new_zeros(len(centroids_CH), dtype=torch.float64)

    def attach(self, ffn: FFN, enter: Callable[[Any], Any]) -> None:
        """Hooks for one batch: keep x on the way in, add to the sums when the gradient of y arrives."""
        kept: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0].detach())

        def after(module: nn.Module, args: object, y: Tensor) -> None:
            if not y.requires_grad:  # all parameters are frozen: the graph begins at the first FFN
                y.requires_grad_()
            y.register_hook(lambda grad: self._add(ffn, kept.pop(), grad))

        enter(ffn.input_module.register_forward_pre_hook(before))
        enter(ffn.output_module.register_forward_hook(after))

    def _add(self, ffn: FFN, x: Tensor, grad: Tensor) -> None:
        weights = ffn.read()
        x_TH, grad_TH = x.flatten(0, -2).float(), grad.flatten(0, -2).float()
        effect_TF = (weights.hidden(x_TH) * (grad_TH @ weights.down_HF)).abs_()
        nearest_T = affinity(x_TH, self.centroids_CH).argmax(1)
        member_TC = nnf.one_hot(nearest_T, len(self.count_C)).float()
        self.sum_CF += member_TC.T @ effect_TF
        self.count_C += member_TC.sum(0)

    def mean(self) -> Tensor:
        """(C, F) float32."""
        return (self.sum_CF / self.count_C.clamp(min=1)[:, None]).float()


def _cluster_inputs(
    model: nn.Module, ffns: Sequence[FFN], batches: Sequence[Tensor], clusters: int, seed: int
) -> list[_Sums]:
    """Centroids of every FFN's inputs on ``batches``, with sums at zero."""
    inputs: list[list[Tensor]] = [[] for _ in ffns]
    with ExitStack() as hooks, torch.no_grad():
        for ffn, kept in zip(ffns, inputs):
            hook = ffn.input_module.register_forward_pre_hook(
                lambda module, args, kept=kept: kept.append(args[0].flatten(0, -2).float())
            )
            hooks.enter_context(hook)
        for batch_BL in batches:
            model(input_ids=batch_BL)
    sums = []
    for ffn, kept in zip(ffns, inputs):
        _, centroids_CH = cluster_balanced(torch.cat(kept), clusters, seed=seed)
        kept.clear()
        sums.append(_Sums(centroids_CH, ffn.read().neurons))
    return sums


def _loss(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """The next-token losses, summed."""
    logits_BLV = getattr(model(input_ids=ids_BL), "logits", None)
    if logits_BLV is None or logits_BLV.shape[:-1] != ids_BL.shape:
        raise ValueError(
            f"gradient importance needs a causal language model; {type(model).__name__} gives no next-token "
            "logits: choose another method"
        )
    loss = nnf.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="sum"
    )
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of {type(model).__name__} is {loss.item()}: its weights or activations overflow"
        )
    return loss


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients; afterwards everything as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_()
