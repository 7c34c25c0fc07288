"""One scale of the final norm: a converted model is less certain than its logits say.

Shapes: T tokens, H model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.on_disk import layers_on_disk
from monge.conversion.teacher import Head, hidden_states

FORWARD_TOKENS = 2_048  # enough for one number; every STRIDE-th of them is looked at, neighbours are alike
STRIDE = 4
BATCH = 2  # sequences in a forward
GRID = tuple(0.70 + 0.025 * i for i in range(15))  # 0.70 to 1.05


def fit_scale(dense_TH: Tensor, converted_TH: Tensor, head: Head, chunk: int = 256) -> float:
    """The factor of the final hidden states that brings the distributions closest to the dense model's.

    ``argmin_s mean_t KL(softmax(head(dense_t)) || softmax(head(s converted_t)))`` over a grid; both are final
    hidden states, norm included.
    """
    sums = torch.zeros(len(GRID), dtype=torch.float64, device=dense_TH.device)
    for dense_tH, converted_tH in zip(dense_TH.split(chunk), converted_TH.split(chunk)):
        target_tV = head.logits(dense_tH).softmax(-1)
        logits_tV = head.logits(converted_tH)
        for i, scale in enumerate(GRID):
            scaled_tV = scale * logits_tV if head.linear else head.logits(scale * converted_tH)
            # KL but for a constant
            sums[i] += scaled_tV.logsumexp(-1).sum(dtype=torch.float64)
            sums[i] -= (target_tV * scaled_tV).sum(dtype=torch.float64)
    return GRID[int(sums.argmin())]


@torch.no_grad()
def calibrate_certainty(model: Any, dense: Any, tokens_NL: Tensor) -> float:
    """Scale the final norm of a converted causal model by the factor that `fit_scale` finds; returns it.

    1 where the norm cannot be scaled.

    Args:
        tokens_NL: text on which nothing was fitted; on fitted text the model is certain with more reason.
    """
    few_NL = tokens_NL[: max(1, FORWARD_TOKENS // tokens_NL.shape[1])]
    size = len(few_NL) if layers_on_disk(model) else BATCH  # a forward reads all layers
    dense_TH, converted_TH = (
        torch.cat([hidden_states(m, batch) for batch in few_NL.split(size)]).flatten(0, 1)[::STRIDE]
        for m in (dense, model)
    )
    scale = fit_scale(dense_TH, converted_TH, Head.of(dense, tokens_NL[:1, :8]))
    return scale if scale_final_norm(model, scale) else 1.0


def scale_final_norm(model: Any, scale: float) -> bool:
    """Multiply the final hidden states by ``scale`` through the weights of the last norm.

    Norms whose factor is their weight, or one plus their weight (Gemma), are told apart by trying. Returns
    False, and changes nothing, where neither is true.
    """
    norm = final_norm(model)
    if norm is None:
        return False
    weight: Any = norm.weight
    probe_1H = torch.randn(1, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    wanted_1H = scale * norm(probe_1H)
    before = [parameter.detach().clone() for parameter in norm.parameters()]
    for offset in (0.0, 1.0):
        with torch.no_grad():
            weight.copy_(scale * (before[0] + offset) - offset)
            for parameter, old in zip(list(norm.parameters())[1:], before[1:]):
                parameter.copy_(scale * old)
        if torch.allclose(norm(probe_1H), wanted_1H, rtol=1e-3, atol=1e-5):
            return True
    with torch.no_grad():
        for parameter, old in zip(norm.parameters(), before):
            parameter.copy_(old)
    return False


def final_norm(model: Any) -> Any:
    """The last module of the base model that holds one vector of the model's width, outside its layers."""
    width = model.get_input_embeddings().weight.shape[1]
    norms = [
        module
        for _, module in model.base_model.named_children()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and tuple(module.weight.shape) == (width,)
    ]
    return norms[-1] if norms else None
