"""Monge's compute paths as an experts implementation of transformers, for stock checkpoints.

transformers lets every MoE model whose experts are stacked as (E, 2I, H) and (E, H, I) choose how they are
computed, by name. The name "monge" stands for `monge.moe`'s table of paths, on the model's own weights:
nothing is copied, and the same model trains and runs. Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and
GraniteMoe are among them; experts with biases, another layout or a gate of their own (GPT-OSS, DeepSeek-V4)
are refused.

Shapes: T tokens, K slots per token, E experts, H model width, I expert width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monge.moe.experts import apply_experts

NAME = "monge"
THEIRS = ("eager", "batched_mm", "grouped_mm")
"""transformers' own implementations, by its names."""
# classes of transformers.activations and torch.nn, by name -> an activation of monge.moe, gated and not
ACTIVATIONS = {
    "SiLUActivation": ("swiglu", None),
    "SiLU": ("swiglu", None),
    "GELUTanh": ("geglu", "gelu_tanh"),
    "NewGELUActivation": ("geglu", "gelu_tanh"),
    "GELUActivation": ("geglu_exact", "gelu"),
    "ReLU": (None, "relu"),
}


def register_experts() -> None:
    """Make "monge" a name for ``model.set_experts_implementation`` and ``from_pretrained``; idempotent.

    Raises:
        ImportError: transformers is not installed.

    Examples:
        >>> import torch, monge.hf
        >>> monge.hf.register_experts()
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...                        num_attention_heads=2, num_key_value_heads=2)
        >>> model = MixtralForCausalLM(config)
        >>> model.set_experts_implementation("monge")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 8])
    """
    _moe_of_transformers().ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)


def use_experts(model: Any) -> Any:
    """Compute the experts of a transformers model by Monge's paths; the model, for chaining.

    The one line: ``monge.hf.use_experts(model)``. ``model.set_experts_implementation("grouped_mm")`` (or
    "eager") goes back.

    Raises:
        ValueError: the model has no experts that transformers can dispatch, or Monge has no path for them.
            The model is then as it was.
        ImportError: transformers is not installed.
    """
    register_experts()
    if not (found := dispatched_experts(model)):
        raise ValueError(
            f"model, a {type(model).__name__}, has no experts that transformers dispatches: give a MoE model "
            "of transformers, such as MixtralForCausalLM"
        )
    for module in found:
        _activation_of(module)
    model.set_experts_implementation(NAME)
    return model


def dispatched_experts(model: Any) -> list[Any]:
    """The modules of experts that ``model.set_experts_implementation`` applies to."""
    if not hasattr(model, "set_experts_implementation"):
        return []
    return [m for m in model.modules() if hasattr(m, "is_concatenated") and hasattr(m, "down_proj")]


def _moe_of_transformers() -> Any:
    try:
        from transformers.integrations import moe
    except ImportError as error:
        raise ImportError("monge.hf needs transformers 5.21 or newer: pip install 'monge[hf]'") from error
    return moe


def _activation_of(experts: Any) -> str:
    """The name in `monge.moe.activations.ACTIVATIONS` of what these experts do between the projections."""
    kind = type(experts).__name__
    own_gate = (
        experts.has_gate and type(experts)._apply_gate is not _moe_of_transformers()._default_apply_gate
    )
    refused = {
        "interleaved gates": experts.has_gate and not experts.is_concatenated,
        "transposed weights": experts.is_transposed,
        "biases": experts.has_bias,
        "a norm after each expert": getattr(experts, "has_post_expert_norm", False),
        "a gate of their own": own_gate,
    }
    reasons = [reason for reason, there in refused.items() if there]
    gated, plain = (
        ACTIVATIONS.get(type(experts.act_fn).__name__, (None, None)) if not reasons else (None, None)
    )
    activation = gated if experts.has_gate else plain
    if activation is None:
        reason = " and ".join(reasons) or f"the activation {type(experts.act_fn).__name__}"
        raise ValueError(
            f"{kind} has {reason}, for which Monge has no compute path: "
            "model.set_experts_implementation('grouped_mm') keeps transformers' own"
        )
    return activation


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of the experts' forward; ``self`` are its experts."""
    # experts of other ranks are numbered E: empty slots here. Older experts do not say if there are any
    if getattr(self, "_is_expert_parallel", True):
        away = top_k_index >= self.num_experts
        top_k_index, top_k_weights = top_k_index.masked_fill(away, -1), top_k_weights.masked_fill(away, 0)
    proj_in = self.gate_up_proj if self.has_gate else self.up_proj
    return apply_experts(
        hidden_states, top_k_index, top_k_weights, proj_in, self.down_proj, _activation_of(self)
    )
