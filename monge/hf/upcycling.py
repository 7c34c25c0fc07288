"""Sparse upcycling (arXiv 2212.05055): a dense model becomes a Mixture of Experts by copying its FFNs.

    dense checkpoint --> every FFN E times + a random router --> standard MoE architecture, the same function

Shapes: E experts, I FFN width, H model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip
"""Fields of the configuration that mean the same in a dense model and in the mixtures that continue it."""

NARROWEST_SHARED = 32
"""Width of a shared expert of zeros, where an architecture must have one: a block of llama.cpp's formats."""


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense class becomes a mixture.

    Attributes:
        model_class, config_class: of the mixture, in transformers.
        fields: of its configuration, from (dense configuration, E, K).
        refuses: fields of the dense configuration that the mixture cannot hold when they are true.
        shared: whether the architecture must have a shared expert, which is then of zeros.
    """

    model_class: str
    config_class: str
    fields: Callable[[Any, int, int], dict[str, Any]]
    refuses: tuple[str, ...] = ("mlp_bias",)
    shared: bool = False


def _mixtral(config: Any, experts: int, top_k: int) -> dict[str, Any]:
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "intermediate_size": config.intermediate_size,
        "sliding_window": getattr(config, "sliding_window", None),
    }


def _qwen(config: Any, experts: int, top_k: int) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": config.intermediate_size,
        "intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,  # equal experts whose gates sum to one are the FFN they were copied from
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.use_sliding_window,
        "sliding_window": config.sliding_window,
    }


def _qwen2(config: Any, experts: int, top_k: int) -> dict[str, Any]:
    own = {"layer_types": deepcopy(config.layer_types), "shared_expert_intermediate_size": NARROWEST_SHARED}
    return _qwen(config, experts, top_k) | own


def _qwen3(config: Any, experts: int, top_k: int) -> dict[str, Any]:
    return _qwen(config, experts, top_k) | {"attention_bias": config.attention_bias}


_LLAMA = Upcycling(
    model_class="MixtralForCausalLM",
    config_class="MixtralConfig",
    fields=_mixtral,
    refuses=("attention_bias", "mlp_bias"),
)
UPCYCLINGS: Mapping[str, Upcycling] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Upcycling(
        model_class="Qwen2MoeForCausalLM", config_class="Qwen2MoeConfig", fields=_qwen2, shared=True
    ),
    "Qwen3ForCausalLM": Upcycling(
        model_class="Qwen3MoeForCausalLM", config_class="Qwen3MoeConfig", fields=_qwen3
    ),
}
"""Dense class of transformers -> what it becomes."""


def upcycle(model: Any, num_experts: int, top_k: int, *, seed: int = 0) -> Any:
    """A Mixture of Experts of transformers that computes what the dense ``model`` does, and can learn more.

    Every expert is a copy of the FFN and the gates of a token sum to one, so at the start the outputs are
    equal up to rounding, whatever the router. Training separates the experts: the router sends them
    different tokens. It costs K times the FLOPs of the dense FFN, unlike `monge.convert`, which divides one.

    Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE (its obligatory shared expert is 32 neurons of
    zeros), Qwen3 becomes Qwen3-MoE. The dense model is left alone; nothing is shared with it.

    Args:
        model: a dense causal language model of transformers.
        num_experts: E, at least 2.
        top_k: K, between 1 and E. With 1 the only gate is one, so the loss teaches the router nothing;
            take a router of Monge that balances, or 2.
        seed: of the router's random weights, of standard deviation ``initializer_range``.

    Raises:
        ValueError: another architecture, or one with parts that the mixture cannot hold; E or K out of range.

    Source: arXiv 2212.05055. Other than there, gates are renormalised, hence exactness.

    Examples:
        >>> import torch, monge
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> dense = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
        >>> sparse = monge.hf.upcycle(dense, num_experts=4, top_k=2)
        >>> ids = torch.arange(16).view(2, 8)
        >>> type(sparse).__name__, torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-5)
        ('MixtralForCausalLM', True)
    """
    kind = UPCYCLINGS.get(type(model).__name__)
    if kind is None:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in UPCYCLINGS)
        raise ValueError(
            f"{type(model).__name__} cannot be upcycled: there are standard mixtures for {known}. See "
            "monge.convert for other models"
        )
    if num_experts < 2 or not 1 <= top_k <= num_experts:
        raise ValueError(
            f"num_experts must be at least 2 and top_k between 1 and it, got {num_experts} and {top_k}"
        )
    _refuse(model.config, kind)
    sparse = _empty(model, kind, num_experts, top_k)
    tensors = _upcycled(model, num_experts, seed)
    if kind.shared:
        tensors |= {
            name: torch.zeros_like(value) for name, value in sparse.state_dict().items() if ".shared_" in name
        }
    sparse.load_state_dict(tensors)
    for name, buffer in model.named_buffers():  # of the rotary embedding, in the dense model's precision
        parent, _, last = name.rpartition(".")
        sparse.get_submodule(parent).register_buffer(last, buffer.clone(), persistent=False)
    return sparse.train(model.training)


def _refuse(config: Any, kind: Upcycling) -> None:
    held = [name for name in kind.refuses if getattr(config, name, False)]
    if held:
        raise ValueError(
            f"{kind.model_class} has no place for what {' and '.join(held)} of the dense model's config "
            "means: upcycle a model without it, or see monge.convert"
        )
    types = set(getattr(config, "layer_types", None) or [])
    if kind.model_class == "Qwen3MoeForCausalLM" and len(types) > 1:
        raise ValueError(
            "Qwen3-MoE gives all layers the same attention, and this model has layers with and without a "
            "sliding window: upcycle a model whose layers are alike"
        )


def _empty(model: Any, kind: Upcycling, num_experts: int, top_k: int) -> Any:
    """The mixture, with weights that are still to come."""
    import transformers
    from transformers.initialization import no_init_weights

    dense = model.config
    carried = {name: deepcopy(getattr(dense, name)) for name in CARRIED if hasattr(dense, name)}
    if carried.get("head_dim") is None:  # unset: what its absence means everywhere
        carried.pop("head_dim", None)
    fields = kind.fields(dense, num_experts, top_k)
    config = getattr(transformers, kind.config_class)(**carried, hidden_act=dense.hidden_act, **fields)
    with no_init_weights():
        sparse = transformers.AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=dense._attn_implementation
        )
    sparse.generation_config = deepcopy(model.generation_config)
    return sparse.to(model.device)


def _upcycled(model: Any, num_experts: int, seed: int) -> dict[str, Tensor]:
    """The weights of the mixture, by their names in it."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if ".mlp." not in name:
            tensors[name] = value
            continue
        mlp, _, part = name.rpartition(".mlp.")
        if part != "gate_proj.weight":
            continue
        ffn = model.get_submodule(f"{mlp}.mlp")
        gate_up_IH = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]).detach()
        router_EH = torch.randn(num_experts, model.config.hidden_size, generator=generator)
        tensors |= {
            f"{mlp}.mlp.experts.gate_up_proj": gate_up_IH.expand(num_experts, -1, -1),
            f"{mlp}.mlp.experts.down_proj": ffn.down_proj.weight.detach().expand(num_experts, -1, -1),
            f"{mlp}.mlp.gate.weight": (router_EH * model.config.initializer_range).to(value),
        }
    return tensors
