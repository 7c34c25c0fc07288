"""From a divided FFN to the MoE layer that stands in its place, gates and scales folded into its weights.

Folding happens here so that export is a mere renaming. As a standard architecture does, the layer computes

    y = sum over the k' chosen experts e of  g_e (k' E_e(x))  +  shared(x) + bd,    sum of the g_e = 1,

with gates g from the chosen logits z, of standard deviation about 1:

    standard    softmax(2^-5 z)                      Mixtral, GraniteMoe, Qwen2-MoE, Qwen3-MoE
    sigmoid     sigmoid(2^-4 z), renormalised        GLM-4-MoE
    binary      softmax(2^-40 z)                     GraniteMoe alone

so that k' g_e is 1 up to a few per cent (1 + 2^-5 z to first order), and 1 to rounding for binary gates. A
power of two scales without rounding.

Shapes: H model width, F neurons of the dense FFN, N routed experts, I neurons of the largest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from monge.conversion.types import DROPPED, SHARED, ExpertShape, FFNWeights, Partition
from monge.moe import MoE
from monge.routing import ROUTERS

GATE_SCALES = {"standard": 2.0**-5, "binary": 2.0**-40, "sigmoid": 2.0**-4}
"""eps, the factor of the logits, by the name of the gates."""
ROUTERS_OF_GATES = {"softmax": "topk", "sigmoid": "sigmoid"}
"""The router (`monge.routing.ROUTERS`) of a converted layer, by the function of its gates."""


def gate_function(gates: str) -> str:
    """The function of the gates of that name: "softmax" or "sigmoid"."""
    return "sigmoid" if gates == "sigmoid" else "softmax"


def chosen_gates(logits_TK: Tensor, gates: str) -> Tensor:
    """(T, K), the gates of a layer built with ``gates``, sum 1, from the logits z of the chosen experts."""
    logits_TK = logits_TK * GATE_SCALES[gates]
    if gate_function(gates) == "sigmoid":
        logits_TK = nnf.logsigmoid(logits_TK)
    return logits_TK.softmax(dim=1)


def make_moe(
    weights: FFNWeights,
    partition: Partition,
    shape: ExpertShape,
    router_NH: Tensor,
    *,
    gates: str = "standard",
) -> MoE:
    """The MoE layer of a divided FFN, in the dtype and on the device of ``weights``.

    Every neuron sits in the expert of its label, or in the shared expert; experts smaller than I are padded
    with zero neurons. k' = ``shape.top_k`` is folded into the experts' ``down_proj``, eps into
    ``router.weight``. With all experts on and equal gates the layer is the dense FFN.

    Args:
        weights: the FFN, F neurons.
        partition: labels in [0, N) or `SHARED`.
        shape: N, k' and the sizes.
        router_NH: (N, H), the weight of the logits z, whose standard deviation on real tokens is about 1.
        gates: "standard", "sigmoid" or "binary": see the table above.

    Raises:
        ValueError: the labels, the router or ``gates`` do not fit.

    Source: arXiv 2606.01666, section 3 (the chosen experts summed with weight 1).

    Examples:
        >>> import torch
        >>> from monge.conversion.types import ExpertShape, FFNWeights, Partition
        >>> dense = FFNWeights("gelu", up_FH=torch.randn(6, 4), down_HF=torch.randn(4, 6))
        >>> labels = Partition(torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> shape = ExpertShape(neurons=6, groups=3, active=3, shared=0)
        >>> layer = make_moe(dense, labels, shape, torch.zeros(3, 4))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(layer(x), dense(x), atol=1e-5)
        True
    """
    if gates not in GATE_SCALES:
        raise ValueError(f"gates must be one of {', '.join(GATE_SCALES)}; got {gates!r}")
    labels_F = partition.labels_F.to(weights.up_FH.device)
    _check(weights, labels_F, shape, router_NH)
    biased = any(b is not None for b in (weights.gate_bias_F, weights.up_bias_F, weights.down_bias_H))
    moe = MoE(
        weights.up_FH.shape[1],
        shape.expert_neurons,
        shape.routed,
        shape.top_k,
        router=ROUTERS_OF_GATES[gate_function(gates)],
        router_options={"renormalise": True},
        activation=weights.activation,
        shared_hidden=shape.shared_neurons,
        bias=biased,
        device="meta",  # so that no random weights are drawn
        dtype=weights.up_FH.dtype,
    ).to_empty(device=weights.up_FH.device)
    with torch.no_grad():
        for weight in moe.parameters():
            weight.zero_()
        _fill(moe, weights, labels_F)
        moe.router.weight.copy_(router_NH * GATE_SCALES[gates])
    return moe


def describe_moe(moe: MoE) -> dict[str, Any]:
    """The shape of a converted layer as plain values, for `empty_moe` and for export.

    Raises:
        ValueError: the layer is not one that a conversion makes: dropless, with gates by softmax or sigmoid
            that sum to 1.
    """
    router = moe.router
    functions = {ROUTERS[name]: function for function, name in ROUTERS_OF_GATES.items()}
    function = functions.get(type(router))
    if function is None or router.bias is not None or moe.capacity_factor is not None:
        raise ValueError(
            f"this MoE routes by {type(router).__name__} with bias={router.bias is not None} and "
            f"capacity_factor={moe.capacity_factor}; a converted layer is dropless, and its router is "
            f"{' or '.join(ROUTERS_OF_GATES.values())} without a bias"
        )
    renormalise = getattr(router, "renormalise", None)
    if not (renormalise or (renormalise is None and moe.top_k > 1)):
        raise ValueError("the gates of a converted MoE sum to 1: router_options={'renormalise': True}")
    return {
        "dim": moe.dim,
        "hidden": moe.experts.hidden,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "activation": moe.experts.activation,
        "shared_hidden": moe.shared.output_linear.in_features if moe.shared is not None else 0,
        "bias": moe.bias is not None,
        "gates": function,
    }


def empty_moe(description: Mapping[str, Any], *, device: torch.device | str = "meta") -> MoE:
    """A layer of the shape that `describe_moe` tells of."""
    shape = dict(description)
    router = ROUTERS_OF_GATES[shape.pop("gates")]
    return MoE(**shape, router=router, router_options={"renormalise": True}, device=device)


def _check(weights: FFNWeights, labels_F: Tensor, shape: ExpertShape, router_NH: Tensor) -> None:
    F, H = weights.up_FH.shape
    N = shape.routed
    if tuple(labels_F.shape) != (F,) or shape.neurons != F:
        raise ValueError(
            f"the FFN has {F} neurons, the partition {tuple(labels_F.shape)} labels and the shape counts "
            f"{shape.neurons} neurons: all must be one number"
        )
    if tuple(router_NH.shape) != (N, H):
        raise ValueError(f"router_NH must be (N={N}, H={H}), got {tuple(router_NH.shape)}")
    if not torch.isfinite(router_NH).all():
        raise ValueError("router_NH holds NaN or infinite weights: the fit of the router failed")
    if (labels_F == DROPPED).any():
        raise ValueError(
            f"{int((labels_F == DROPPED).sum())} of {F} neurons are labelled DROPPED: a pruned FFN stays "
            "dense, use FFN.narrow(weights.select(kept))"
        )
    strange_F = (labels_F >= N) | (labels_F < 0) & (labels_F != SHARED)
    if strange_F.any():
        raise ValueError(f"labels must be in [0, {N}) or SHARED; got {labels_F[strange_F].unique().tolist()}")
    shared = int((labels_F == SHARED).sum())
    largest = int(torch.bincount(labels_F[labels_F >= 0], minlength=N).max())
    if shared != shape.shared_neurons or largest > shape.expert_neurons:
        raise ValueError(
            f"the partition has {shared} shared neurons and up to {largest} in an expert; its shape "
            f"{shape} asks for {shape.shared_neurons} and at most {shape.expert_neurons}"
        )


def _fill(moe: MoE, weights: FFNWeights, labels_F: Tensor) -> None:
    experts = moe.experts
    proj_in_NJH: Tensor = getattr(experts, experts.input_name)
    bias_NJ: Tensor | None = getattr(experts, experts.bias_name) if experts.bias_name else None
    for e in range(moe.num_experts):
        mine = weights.select(torch.where(labels_F == e)[0])
        _fill_input(proj_in_NJH[e], bias_NJ[e] if bias_NJ is not None else None, mine)
        experts.down_proj[e, :, : mine.neurons] = mine.down_HF * moe.top_k
    if moe.shared is not None:
        mine = weights.select(torch.where(labels_F == SHARED)[0])
        _fill_input(moe.shared.input_linear.weight, moe.shared.input_linear.bias, mine)
        moe.shared.output_linear.weight.copy_(mine.down_HF)
    if moe.bias is not None and weights.down_bias_H is not None:
        moe.bias.copy_(weights.down_bias_H)


def _fill_input(proj_in_JH: Tensor, bias_J: Tensor | None, mine: FFNWeights) -> None:
    """Gate rows into the first half of J, up rows into the second; all of J is for up if there is no gate."""
    parts = [(mine.up_FH, mine.up_bias_F)]
    if mine.gate_FH is not None:
        parts.insert(0, (mine.gate_FH, mine.gate_bias_F))
    for i, (weight_FH, bias_F) in enumerate(parts):
        start = i * proj_in_JH.shape[0] // len(parts)
        rows = slice(start, start + mine.neurons)
        proj_in_JH[rows] = weight_FH
        if bias_J is not None and bias_F is not None:
            bias_J[rows] = bias_F
