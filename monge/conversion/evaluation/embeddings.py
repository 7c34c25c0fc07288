"""How far the embeddings of an encoder are from those of the dense model it came from.

Shapes: N chunks, L tokens of a chunk, B chunks of a batch, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monge.conversion.evaluation.quality import check_chunks
from monge.conversion.observer import Observer, Silent


@dataclass(frozen=True)
class EmbeddingQuality:
    """Cosines between the embeddings of two models.

    Attributes:
        cosine: mean over chunks.
        cosine_min: of the worst chunk.
        chunks: their number.
    """

    cosine: float
    cosine_min: float
    chunks: int


@torch.no_grad()
def compare_embeddings(
    dense: nn.Module,
    converted: nn.Module,
    chunks_NL: Tensor,
    *,
    batch: int = 8,
    observer: Observer | None = None,
) -> EmbeddingQuality:
    """Cosine between the mean-pooled last hidden states of two encoders, chunk by chunk.

    Args:
        dense, converted: encoders of transformers.
        chunks_NL: int64 token ids, special tokens included and without padding.
        batch: chunks in a forward.
        observer: is told of every batch.

    Raises:
        ValueError: chunks that are no (N, L >= 2) ids of the vocabulary.

    Examples:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from monge.conversion.evaluation import compare_embeddings
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertModel(BertConfig(vocab_size=50, **sizes))
        >>> round(compare_embeddings(model, model, torch.arange(40).view(4, 10)).cosine, 5)
        1.0
    """
    check_chunks((dense, converted), chunks_NL, batch)
    observer = observer or Silent()
    cosines = []
    for ids_BL in chunks_NL.split(batch):
        a_BH, b_BH = _embed(dense, ids_BL), _embed(converted, ids_BL)
        cosines.append(torch.cosine_similarity(a_BH, b_BH, dim=1).double())
        observer.advance(len(ids_BL))
    cosine_N = torch.cat(cosines)
    return EmbeddingQuality(float(cosine_N.mean()), float(cosine_N.min()), len(cosine_N))


def _embed(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """(B, H) float32 on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return model(input_ids=ids_BL.to(device)).last_hidden_state.float().mean(dim=1).cpu()
