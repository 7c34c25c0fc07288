"""The Mixture-of-Experts layer, its experts, and how they are computed."""

from monge.moe.experts import Experts, SharedExpert
from monge.moe.layer import MoE

__all__ = ["Experts", "MoE", "SharedExpert"]
