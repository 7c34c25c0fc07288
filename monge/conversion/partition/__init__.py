"""How the neurons of a dense FFN are divided among experts. One method a file; this is the table of names.

Which one to choose: ``ot_lloyd``, unless you compare; ``static`` is the baseline to beat, ``random`` the
control.
"""

from __future__ import annotations

from dataclasses import dataclass

from monge.conversion.partition.activation_kmeans import cluster_activations
from monge.conversion.partition.cmoe import carve_experts
from monge.conversion.partition.gradient import assign_by_importance
from monge.conversion.partition.ot_lloyd import divide_by_captured_energy
from monge.conversion.partition.random_split import split_at_random
from monge.conversion.partition.static import keep_strongest
from monge.conversion.partition.weight_kmeans import cluster_weights
from monge.conversion.types import PartitionMethod


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table."""

    function: PartitionMethod | None
    """None where the partition is learned through the whole model (`monge.conversion.alignment`)."""
    citation: str
    needs_gradients: bool = False
    """Needs ``LayerSample.importance_CF`` for as many clusters of tokens as there are routed experts."""
    analytic_router: bool = False
    """Gives ``Partition.router_NH``."""
    dense: bool = False
    """Keeps or drops neurons: the result is a narrower dense model, without experts or router."""


METHODS: dict[str, Method] = {
    "dot": Method(
        function=None,
        citation="DOT-MoE 2026, arXiv 2606.01666",
    ),
    "ot_lloyd": Method(
        function=divide_by_captured_energy,
        citation="Monge: Lloyd's algorithm with exact optimal transport",
        analytic_router=True,
    ),
    "random": Method(
        function=split_at_random,
        citation="Zhu et al. 2024, LLaMA-MoE, arXiv 2406.16554",
    ),
    "weight_kmeans": Method(
        function=cluster_weights,
        citation="Zhang et al. 2022, MoEfication, arXiv 2110.01786",
        analytic_router=True,
    ),
    "activation_kmeans": Method(
        function=cluster_activations,
        citation="after the co-activation split of Zhang et al. 2022, MoEfication, arXiv 2110.01786",
    ),
    "cmoe": Method(
        function=carve_experts,
        citation="Pei et al. 2025, CMoE, arXiv 2502.04416",
        analytic_router=True,
    ),
    "gradient": Method(
        function=assign_by_importance,
        citation="Qu et al. 2024, LLaMA-MoE-v2, arXiv 2411.15708",
        needs_gradients=True,
    ),
    "static": Method(
        function=keep_strongest,
        citation="Sun et al. 2024, Wanda, arXiv 2306.11695, applied to whole neurons",
        dense=True,
    ),
}
"""The partition methods by name."""

__all__ = ["METHODS", "Method"]
