"""What a conversion reports of itself when it is done: figures on text that it has never seen.

Shapes: N sequences, L tokens in each.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from monge.conversion.evaluation import (
    active_shares,
    compare_embeddings,
    compare_models,
    measure_cost,
)
from monge.conversion.evaluation.layers import watched_layers
from monge.conversion.job import Job
from monge.conversion.on_disk import layers_on_disk

TEXT = "held-out"
LOGITS = 2**26  # of two models in a forward whose layers are read from disk: 256 MB


@torch.no_grad()
def assess(job: Job) -> dict[str, Any]:
    """Compare the converted model of the job with the dense one; records what it finds.

    Returns:
        perplexity, perplexity_dense, kl (nats per token) and agreement of a causal model; cosine of a text
        encoder (mean over the held-out sequences); always ffn_active, params_active
        and params_total.
    """
    dense, converted = job.reopen(), job.source.model
    cost = measure_cost(converted, dense)
    summary: dict[str, Any] = {
        "ffn_active": cost.ffn_active,
        "params_active": cost.params_active,
        "params_total": cost.params_total,
    }
    if job.corpus is None:
        return summary
    held_out_NL = job.corpus.evaluation_NL
    if not job.source.causal:
        figures = asdict(compare_embeddings(dense, converted, held_out_NL))
        job.record({"kind": "eval", "model": "converted", "text": TEXT, **figures})
        return summary | {"cosine": figures["cosine"]}
    job.observer.stage("evaluate", len(held_out_NL))
    with watched_layers(dense, converted, active_shares(converted, dense)) as layers:
        batch = _batch(converted, held_out_NL)
        quality = compare_models(dense, converted, held_out_NL, batch=batch, observer=job.observer)
    figures = asdict(quality)
    job.record({"kind": "eval", "model": "converted", "text": TEXT, "k_offset": 0, **figures})
    for layer in layers:
        job.record({"kind": "layer_eval", **asdict(layer), "dead": layer.dead})
    return {name: figures[name] for name in ("perplexity", "perplexity_dense", "kl", "agreement")} | summary


def _batch(model: Any, chunks_NL: Tensor) -> int:
    """Sequences in a forward: one, or as many as `LOGITS` allows where each forward reads all layers."""
    if not layers_on_disk(model):
        return 1
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(1, LOGITS // (2 * chunks_NL.shape[1] * vocabulary))
