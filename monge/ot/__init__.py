"""Optimal transport for routing: scores (T, E) in; plans, assignments, prices and partitions out."""

from monge.ot.assignment import Assignment, assign
from monge.ot.entropic import TransportPlan, sinkhorn
from monge.ot.partition import balanced_partition
from monge.ot.prices import margin_prices, quantile_prices, sign_prices
from monge.ot.relaxed import soft_topk

__all__ = [
    "Assignment",
    "TransportPlan",
    "assign",
    "balanced_partition",
    "margin_prices",
    "quantile_prices",
    "sign_prices",
    "sinkhorn",
    "soft_topk",
]
