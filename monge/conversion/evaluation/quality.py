"""Perplexity, KL divergence and top-1 agreement of language models, streamed over chunks of tokens.

    chunk --> logits of the dense and of the converted model --> sums in float64 --> Quality

Logits of one batch at a time are held; their softmax is taken for a few positions at a time. A token is
predicted from those before it in its own chunk: a chunk of L tokens has L - 1 predictions.

Shapes: N chunks, L tokens of a chunk, B chunks of a batch, P predicted positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from monge.conversion.observer import Observer, Silent
from monge.hf.blocks import shifted_top_k

POSITIONS_AT_ONCE = 128

Predictor = Callable[[Tensor], Tensor]
"""(B, L) ids to the (P, V) logits of a model in some state, such as `logits_of` that model."""


@dataclass(frozen=True)
class Quality:
    """How a model predicts text, beside the dense model it came from.

    Attributes:
        perplexity: exp of the mean negative log likelihood per predicted token.
        perplexity_dense: that of the dense model.
        kl: mean KL(dense || converted) per predicted token, nats.
        agreement: share of positions at which both find the same token the most likely.
        tokens: predicted tokens.
    """

    perplexity: float
    perplexity_dense: float
    kl: float
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Sums:
    """What `Quality` is the mean of, over the tokens seen so far; sums add up."""

    nll: float = 0.0
    nll_dense: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def means(self) -> Quality:
        """The figures per token."""
        n = self.tokens
        kl = max(self.kl / n, 0.0)  # rounding can leave it a hair below zero
        return Quality(_exp(self.nll / n), _exp(self.nll_dense / n), kl, self.agreed / n, n)


def compare_models(
    dense: nn.Module,
    converted: nn.Module,
    chunks_NL: Tensor,
    *,
    k_offset: int = 0,
    batch: int = 1,
    observer: Observer | None = None,
) -> Quality:
    """Perplexity of both models, and how far the converted one is from the dense one.

    ``KL = mean_p sum_v p_dense(v) (log p_dense(v) - log p_converted(v))``, logits and softmax in float32,
    sums in float64. Both models are put into evaluation mode.

    Args:
        dense, converted: causal language models of transformers with one vocabulary.
        chunks_NL: int64 token ids.
        k_offset: the converted model takes so many experts more per token (`shifted_top_k`).
        batch: chunks in a forward. Memory grows by ``2 B L V`` floats.
        observer: is told of every batch.

    Raises:
        ValueError: chunks that are no (N, L >= 2) ids of the vocabulary, different vocabularies, or logits
            that are NaN.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from monge.conversion.evaluation import compare_models
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> quality = compare_models(model, model, torch.arange(40).view(4, 10))
        >>> quality.kl, quality.agreement, quality.tokens
        (0.0, 1.0, 36)
    """
    check_chunks((dense, converted), chunks_NL, batch)
    predict = predictor(converted, k_offset)
    (total,) = sum_predictors(dense, [predict], chunks_NL, batch=batch, observer=observer)
    return total.means()


def predictor(model: nn.Module, k_offset: int = 0) -> Predictor:
    """``model`` as a `Predictor`, with ``k_offset`` experts more per token (`shifted_top_k`)."""

    def predict(ids_BL: Tensor) -> Tensor:
        with shifted_top_k(model, k_offset) if k_offset else nullcontext():
            return logits_of(model, ids_BL)

    return predict


def sum_predictors(
    dense: nn.Module,
    predictors: Sequence[Predictor],
    chunks_NL: Tensor,
    *,
    batch: int = 1,
    observer: Observer | None = None,
) -> list[Sums]:
    """What `compare_models` sums, for several models beside one, whose logits are computed once."""
    totals = [Sums()] * len(predictors)
    observer = observer or Silent()
    for ids_BL in chunks_NL.split(batch):
        dense_PV = logits_of(dense, ids_BL)
        targets_P = ids_BL[:, 1:].flatten()
        for index, predict in enumerate(predictors):
            totals[index] += _sums(dense_PV, predict(ids_BL), targets_P)
        observer.advance(len(ids_BL))
    return totals


def perplexity(
    model: nn.Module, chunks_NL: Tensor, *, batch: int = 1, observer: Observer | None = None
) -> float:
    """``exp(mean negative log likelihood)`` of one model; arguments and errors as in `compare_models`."""
    check_chunks((model,), chunks_NL, batch)
    observer = observer or Silent()
    total, tokens = 0.0, 0
    for ids_BL in chunks_NL.split(batch):
        targets_P = ids_BL[:, 1:].flatten()
        parts = (x.split(POSITIONS_AT_ONCE) for x in (logits_of(model, ids_BL), targets_P))
        for logits_RV, targets_R in zip(*parts):
            total += float(_picked(logits_RV.log_softmax(-1), targets_R).sum(dtype=torch.float64))
        tokens += len(targets_P)
        observer.advance(len(ids_BL))
    return _exp(-total / tokens)


@torch.no_grad()
def logits_of(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """(P, V) float32 on the model's device: the predictions of all tokens but the first, in evaluation mode.

    Raises:
        ValueError: a logit is NaN.
    """
    model.eval()
    device = next(model.parameters()).device
    logits_BLV = model(input_ids=ids_BL.to(device), use_cache=False).logits
    logits_PV = logits_BLV[:, :-1].reshape(-1, logits_BLV.shape[-1]).float()
    if torch.isnan(logits_PV.sum()):
        raise ValueError(
            f"{type(model).__name__} gives NaN logits: its weights are damaged, or overflow in "
            f"{next(model.parameters()).dtype}; load it in float32, or convert it again"
        )
    return logits_PV


@torch.no_grad()
def _sums(dense_PV: Tensor, logits_PV: Tensor, targets_P: Tensor) -> Sums:
    if dense_PV.shape != logits_PV.shape:
        raise ValueError(
            f"the models must share one vocabulary, got {dense_PV.shape[-1]} and {logits_PV.shape[-1]} "
            "tokens: compare a converted model with the dense one that it came from"
        )
    total = Sums()
    device = dense_PV.device
    parts = (x.to(device).split(POSITIONS_AT_ONCE) for x in (dense_PV, logits_PV, targets_P))
    for dense_RV, logits_RV, targets_R in zip(*parts):
        log_p_RV, log_q_RV = dense_RV.log_softmax(-1), logits_RV.log_softmax(-1)
        total += Sums(
            nll=-float(_picked(log_q_RV, targets_R).sum(dtype=torch.float64)),
            nll_dense=-float(_picked(log_p_RV, targets_R).sum(dtype=torch.float64)),
            kl=float((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(dtype=torch.float64)),
            agreed=int((dense_RV.argmax(-1) == logits_RV.argmax(-1)).sum()),
            tokens=len(targets_R),
        )
    return total


def _picked(log_p_RV: Tensor, targets_R: Tensor) -> Tensor:
    return log_p_RV.gather(1, targets_R.to(log_p_RV.device)[:, None])


def check_chunks(models: Sequence[nn.Module], chunks_NL: Tensor, batch: int = 1) -> None:
    """Raises ValueError unless the chunks are token ids of every model's vocabulary."""
    if chunks_NL.dim() != 2 or chunks_NL.shape[1] < 2 or not len(chunks_NL) or chunks_NL.is_floating_point():
        raise ValueError(
            f"chunks_NL must be token ids (N >= 1, L >= 2), got {chunks_NL.dtype} {tuple(chunks_NL.shape)}"
        )
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    for model in models:
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if chunks_NL.min() < 0 or chunks_NL.max() >= vocabulary:
            raise ValueError(
                f"chunks_NL has ids from {int(chunks_NL.min())} to {int(chunks_NL.max())}, and "
                f"{type(model).__name__} has a vocabulary of {vocabulary}: use the model's own tokenizer"
            )


def _exp(mean_nll: float) -> float:
    return math.exp(min(mean_nll, 700.0))  # records hold no infinity
