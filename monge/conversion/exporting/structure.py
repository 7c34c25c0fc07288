"""What a converted model is made of, and what it therefore needs of an architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from monge.conversion.building import describe_moe
from monge.conversion.exporting import needs
from monge.moe import MoE

SMALLEST_LOGITS = 2.0**-20
"""Norm of router rows below which a float32 softmax over all experts ties."""

WIDTH_STEP = 8
"""Engines' grouped matrix products take rows of a multiple of 16 bytes, of bfloat16 too."""

LAYER = re.compile(r"model\.layers\.(\d+)\.mlp")


@dataclass(frozen=True)
class Structure:
    """A model whose FFNs may have been replaced by `monge.MoE`."""

    model: nn.Module

    @property
    def config(self) -> Any:
        """The source's transformers configuration."""
        return self.model.config

    @property
    def model_class(self) -> str:
        """Name of the model's class in transformers."""
        return type(self.model).__name__

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: that of the first."""
        return next(self.model.parameters()).dtype

    @cached_property
    def moes(self) -> dict[str, MoE]:
        """The converted layers by their path in the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, MoE)}

    @cached_property
    def shapes(self) -> dict[str, dict[str, Any]]:
        """`describe_moe` of each."""
        return {name: describe_moe(moe) for name, moe in self.moes.items()}

    @property
    def shape(self) -> dict[str, Any]:
        """The shape of the layers where all are alike: the first."""
        return next(iter(self.shapes.values()))

    @property
    def expert_width(self) -> int:
        """Width of an exported expert: that of the layers, rounded up to `WIDTH_STEP`."""
        return -(-self.shape["hidden"] // WIDTH_STEP) * WIDTH_STEP

    @cached_property
    def dense_layers(self) -> list[int]:
        """Indices of the decoder layers that hold no experts."""
        converted = {int(match[1]) for name in self.moes if (match := LAYER.fullmatch(name))}
        return [i for i in range(self.config.num_hidden_layers) if i not in converted]

    @cached_property
    def keys(self) -> set[str]:
        """Names of the model's weights, without layer numbers."""
        return {re.sub(r"\.\d+\.", ".*.", name) for name in self.model.state_dict(keep_vars=True)}

    def has(self, key: str) -> bool:
        """Whether a layer holds the weight ``key``, for example ``self_attn.q_proj.bias``."""
        return f"model.layers.*.{key}" in self.keys

    @property
    def windows(self) -> list[bool]:
        """For each layer, whether its attention reaches less far back than the context does."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        count = config.num_hidden_layers
        if not window or window >= config.max_position_embeddings:
            return [False] * count
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
        return [kind == "sliding_attention" for kind in kinds]

    @cached_property
    def needs(self) -> frozenset[str]:
        """What an architecture must hold beside experts with gates that sum to 1."""
        shapes = list(self.shapes.values())
        dense, windows = self.dense_layers, self.windows
        first = min(set(range(len(windows))) - set(dense), default=0)
        present = {
            needs.SHARED_EXPERTS: any(shape["shared_hidden"] for shape in shapes),
            needs.DENSE_LAYERS: bool(dense),
            needs.LATER_DENSE_LAYERS: any(i > first for i in dense),
            needs.UNEQUAL_LAYERS: any(shape != shapes[0] for shape in shapes),
            needs.UNUSUAL_PLACES: not all(LAYER.fullmatch(name) for name in self.moes),
            needs.FFN_BIAS: any(shape["bias"] for shape in shapes) or self.has("mlp.down_proj.bias"),
            needs.QKV_BIAS: self.has("self_attn.q_proj.bias"),
            needs.OUTPUT_BIAS: self.has("self_attn.o_proj.bias"),
            needs.QK_NORM: self.has("self_attn.q_norm.weight"),
            needs.WINDOW: any(windows),
            needs.SOME_WINDOWS: any(windows) and not all(windows),
            # a single gate is 1 in any case
            needs.SOFTMAX_GATES: any(s["gates"] == "softmax" and s["top_k"] > 1 for s in shapes),
            needs.SIGMOID_GATES: any(s["gates"] == "sigmoid" and s["top_k"] > 1 for s in shapes),
            needs.SINGLE_EXPERT: any(s["num_experts"] == 1 for s in shapes),
            needs.BINARY_GATES: any(
                moe.top_k < moe.num_experts and moe.router.weight.norm(dim=1).max() < SMALLEST_LOGITS
                for moe in self.moes.values()
            ),
        }
        return frozenset(need for need, is_there in present.items() if is_there)
