"""Monge inside the MoE models of transformers, which is not imported before it is needed."""

from monge.hf.experts import register_experts, use_experts

__all__ = ["register_experts", "use_experts"]
