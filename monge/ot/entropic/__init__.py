"""Entropic optimal transport: soft, balanced and differentiable plans between rows and columns."""

from monge.ot.entropic.plan import TransportPlan, sinkhorn

__all__ = ["TransportPlan", "sinkhorn"]
