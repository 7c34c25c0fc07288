"""The standard architectures that can hold a converted model, as data: what they hold, keys and fields.

To add one, describe it here and name it in `CONTINUATIONS`; nothing else needs to know.

Mixtral and the Qwens take the softmax over all experts and renormalise the k largest, Granite takes it over
the k largest logits: both are our gates by softmax. GLM-4 renormalises the k largest sigmoids.

llama.cpp does not renormalise in Qwen2-MoE; the other targets it serves as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monge.conversion.exporting import needs
from monge.conversion.exporting.structure import Structure
from monge.hf.upcycling import CARRIED, NARROWEST_SHARED

ACTIVATION_NAMES = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "geglu_exact": "gelu"}
"""Of gated FFNs, as transformers names them."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A standard Mixture-of-Experts architecture of transformers.

    Attributes:
        model_class: its class for language modelling, with ``config_class``.
        holds: the needs of `Structure.needs` that it can hold.
        keys: where the parts of a converted layer go, below ``model.layers.N.``: ``router``, ``gate_up`` or
            ``gate`` and ``up``, ``down``, and the same with ``shared_``. ``{e}`` is the number of an expert.
        fields: fields of its configuration, from the structure.
        shared_scale: factor of the shared expert's output.
        shared_width: width that the shared expert is padded to.
        extras: further weights of a converted layer, from the structure; None leaves one out.
    """

    model_class: str
    config_class: str
    holds: frozenset[str]
    keys: Mapping[str, str]
    fields: Mapping[str, Callable[[Structure], Any]]
    shared_scale: float = 1.0
    shared_width: Callable[[Structure], int] = lambda structure: structure.shape["shared_hidden"]
    extras: Mapping[str, Callable[[Structure], Tensor | None]] = field(default_factory=dict)

    def config(self, structure: Structure) -> Any:
        """The configuration of the exported model, an object of transformers."""
        import transformers

        source = structure.config
        carried = {name: deepcopy(getattr(source, name)) for name in CARRIED if hasattr(source, name)}
        if carried.get("head_dim") is None:  # unset in the source: what its absence means everywhere
            carried.pop("head_dim", None)
        own = {name: value(structure) for name, value in self.fields.items()}
        act = {"hidden_act": ACTIVATION_NAMES[structure.shape["activation"]]}
        config = getattr(transformers, self.config_class)(**carried, **act, **own)
        config.architectures = [self.model_class]
        return config


def head_width(structure: Structure) -> int:
    """Width of an attention head."""
    config = structure.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _zeros(*names: str) -> Callable[[Structure], Tensor]:
    """Zeros of the named sizes of the layers' shape; "one" is 1."""
    return lambda x: torch.zeros([{**x.shape, "one": 1}[name] for name in names], dtype=x.dtype)


def _whole_experts(x: Structure) -> int:
    """Width of the shared expert as a multiple of the routed ones', at least one."""
    return max(1, -(-x.shape["shared_hidden"] // x.expert_width)) * x.expert_width


def _missing_output_bias(x: Structure) -> Tensor | None:
    """Granite's attention_bias means a bias of the output, too; Qwen2 has none."""
    return _zeros("dim")(x) if needs.QKV_BIAS in x.needs and needs.OUTPUT_BIAS not in x.needs else None


SOFTMAX = frozenset({needs.SOFTMAX_GATES, needs.SINGLE_EXPERT})
ANY_LAYERS = frozenset({needs.DENSE_LAYERS, needs.LATER_DENSE_LAYERS})

GRANITE_KEYS = {
    "router": "block_sparse_moe.router.layer.weight",
    "gate_up": "block_sparse_moe.input_linear.weight",
    "down": "block_sparse_moe.output_linear.weight",
}
GRANITE_FIELDS: dict[str, Callable[[Structure], Any]] = {
    "num_local_experts": lambda x: x.shape["num_experts"],
    "num_experts_per_tok": lambda x: x.shape["top_k"],
    "intermediate_size": lambda x: x.expert_width,
    "attention_bias": lambda x: needs.QKV_BIAS in x.needs,
    # a Granite keeps its multipliers; these make it a Llama
    "attention_multiplier": lambda x: getattr(x.config, "attention_multiplier", head_width(x) ** -0.5),
    "embedding_multiplier": lambda x: getattr(x.config, "embedding_multiplier", 1.0),
    "residual_multiplier": lambda x: getattr(x.config, "residual_multiplier", 1.0),
    "logits_scaling": lambda x: getattr(x.config, "logits_scaling", 1.0),
}
GRANITE_HOLDS = SOFTMAX | {needs.QKV_BIAS, needs.OUTPUT_BIAS, needs.BINARY_GATES}

QWEN_KEYS = {
    "router": "mlp.gate.weight",
    "gate": "mlp.experts.{e}.gate_proj.weight",
    "up": "mlp.experts.{e}.up_proj.weight",
    "down": "mlp.experts.{e}.down_proj.weight",
}
QWEN_FIELDS: dict[str, Callable[[Structure], Any]] = {
    "num_experts_per_tok": lambda x: x.shape["top_k"],
    "moe_intermediate_size": lambda x: x.expert_width,
    "intermediate_size": lambda x: x.config.intermediate_size,  # of the dense layers
    "norm_topk_prob": lambda _: True,
}
SPARSE_LAYERS: dict[str, Callable[[Structure], Any]] = {
    "num_experts": lambda x: x.shape["num_experts"],
    "decoder_sparse_step": lambda _: 1,
    "mlp_only_layers": lambda x: x.dense_layers,
    "use_sliding_window": lambda x: needs.WINDOW in x.needs,
    "sliding_window": lambda x: getattr(x.config, "sliding_window", None),
}

ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        model_class="MixtralForCausalLM",
        config_class="MixtralConfig",
        holds=SOFTMAX | {needs.WINDOW},
        keys={
            "router": "block_sparse_moe.gate.weight",
            "gate": "block_sparse_moe.experts.{e}.w1.weight",
            "up": "block_sparse_moe.experts.{e}.w3.weight",
            "down": "block_sparse_moe.experts.{e}.w2.weight",
        },
        fields={
            "num_local_experts": lambda x: x.shape["num_experts"],
            "num_experts_per_tok": lambda x: x.shape["top_k"],
            "intermediate_size": lambda x: x.expert_width,
            "sliding_window": lambda x: x.config.sliding_window if needs.WINDOW in x.needs else None,
        },
    ),
    "granitemoe": Architecture(
        model_class="GraniteMoeForCausalLM",
        config_class="GraniteMoeConfig",
        holds=GRANITE_HOLDS,
        keys=GRANITE_KEYS,
        fields=GRANITE_FIELDS,
        extras={"self_attn.o_proj.bias": _missing_output_bias},
    ),
    "granitemoeshared": Architecture(
        model_class="GraniteMoeSharedForCausalLM",
        config_class="GraniteMoeSharedConfig",
        holds=GRANITE_HOLDS | {needs.SHARED_EXPERTS},
        keys=GRANITE_KEYS
        | {
            "shared_gate_up": "shared_mlp.input_linear.weight",
            "shared_down": "shared_mlp.output_linear.weight",
        },
        fields=GRANITE_FIELDS | {"shared_intermediate_size": lambda x: x.shape["shared_hidden"]},
        extras={"self_attn.o_proj.bias": _missing_output_bias},
    ),
    "qwen2_moe": Architecture(
        model_class="Qwen2MoeForCausalLM",
        config_class="Qwen2MoeConfig",
        holds=SOFTMAX | ANY_LAYERS | {needs.SHARED_EXPERTS, needs.QKV_BIAS, needs.WINDOW, needs.SOME_WINDOWS},
        keys=QWEN_KEYS
        | {
            "shared_gate": "mlp.shared_expert.gate_proj.weight",
            "shared_up": "mlp.shared_expert.up_proj.weight",
            "shared_down": "mlp.shared_expert.down_proj.weight",
        },
        fields=QWEN_FIELDS
        | SPARSE_LAYERS
        | {
            "qkv_bias": lambda x: needs.QKV_BIAS in x.needs,
            "shared_expert_intermediate_size": lambda x: x.shape["shared_hidden"] or NARROWEST_SHARED,
            "layer_types": lambda x: ["sliding_attention" if w else "full_attention" for w in x.windows],
        },
        # its gate of zeros lets half of the shared expert through: sigmoid(0)
        shared_scale=2.0,
        shared_width=lambda x: x.shape["shared_hidden"] or NARROWEST_SHARED,
        extras={"mlp.shared_expert_gate.weight": _zeros("one", "dim")},
    ),
    "qwen3_moe": Architecture(
        model_class="Qwen3MoeForCausalLM",
        config_class="Qwen3MoeConfig",
        holds=SOFTMAX | ANY_LAYERS | {needs.QKV_BIAS, needs.OUTPUT_BIAS, needs.QK_NORM, needs.WINDOW},
        keys=QWEN_KEYS,
        fields=QWEN_FIELDS | SPARSE_LAYERS | {"attention_bias": lambda x: needs.QKV_BIAS in x.needs},
    ),
    "glm4_moe": Architecture(
        model_class="Glm4MoeForCausalLM",
        config_class="Glm4MoeConfig",
        holds=frozenset(
            {needs.SHARED_EXPERTS, needs.DENSE_LAYERS, needs.QKV_BIAS, needs.QK_NORM, needs.SIGMOID_GATES}
        ),
        keys=QWEN_KEYS
        | {
            "shared_gate": "mlp.shared_experts.gate_proj.weight",
            "shared_up": "mlp.shared_experts.up_proj.weight",
            "shared_down": "mlp.shared_experts.down_proj.weight",
        },
        fields=QWEN_FIELDS
        | {
            "n_routed_experts": lambda x: x.shape["num_experts"],
            "n_shared_experts": lambda x: _whole_experts(x) // x.expert_width,
            "first_k_dense_replace": lambda x: len(x.dense_layers),
            "use_qk_norm": lambda x: needs.QK_NORM in x.needs,
            "attention_bias": lambda x: needs.QKV_BIAS in x.needs,
            "partial_rotary_factor": lambda _: 1.0,
            "num_nextn_predict_layers": lambda _: 0,
        },
        shared_width=_whole_experts,
        extras={"mlp.gate.e_score_correction_bias": lambda x: _zeros("num_experts")(x).float()},
    ),
}

CONTINUATIONS: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": ("mixtral", "granitemoe", "granitemoeshared", "qwen2_moe"),
    "MistralForCausalLM": ("mixtral", "granitemoe", "granitemoeshared", "qwen2_moe"),
    "Qwen2ForCausalLM": ("qwen2_moe", "granitemoe", "granitemoeshared"),
    "Qwen3ForCausalLM": ("qwen3_moe", "glm4_moe"),
    "GraniteForCausalLM": ("granitemoe", "granitemoeshared"),
}
"""For each class of dense models the architectures that continue it; `auto` tries them in this order."""

TARGETS: dict[str, str] = {
    **{name: architecture.model_class for name, architecture in ARCHITECTURES.items()},
    "dense": "the source's own architecture, for a model without experts (static pruning)",
    "monge": "a checkpoint of Monge (safetensors and JSON), for every other model",
}
"""What an export can be, by the name of ``to``."""
