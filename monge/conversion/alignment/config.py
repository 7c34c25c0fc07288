"""The settings of joint training, and what of them changes from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass

CHOICES = {
    "rounding": ("exact", "greedy"),
    "estimator": ("soft_topk", "softmax", "sigmoid"),
    "settled_estimator": ("soft_topk", "softmax", "sigmoid"),
}


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How `align` trains; the defaults are those that train well at small scale, `PAPER` are the published.

    Raises:
        ValueError: a rate, share or coefficient is out of range, or a name unknown; the message names it.

    Examples:
        >>> from monge.conversion.alignment import AlignmentConfig
        >>> config = AlignmentConfig()
        >>> config.freeze_step(1000)
        720
        >>> [round(config.temperature(step, 1000), 2) for step in (0, 100, 200, 999)]
        [1.0, 0.55, 0.1, 0.1]
    """

    learn_partition: bool = True
    """Learn the affinities of neurons to experts; otherwise the given partitions stay as they are."""

    kl: float = 2.0
    """Coefficient of KL(dense || sparse), nats per token."""
    ce: float = 1.0
    """Coefficient of the cross-entropy of the next token, nats per token."""
    z: float = 1e-3
    """Coefficient of the z-loss of the routers, mean over layers."""
    balance: float = 1e-2
    """Coefficient of the load-balance loss of the routers, mean over layers."""

    affinity_rate: float = 2e-2
    """Peak learning rate of the affinities."""
    router_rate: float = 6e-3
    """Peak learning rate of the routers."""
    weight_rate: float = 0.0
    """Peak learning rate of the model's own weights, embeddings and head excepted; 0 keeps them frozen."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW (per step, times the learning rate)."""
    clip: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it."""
    warmup: float = 0.2
    """Share of the steps over which rates rise and the temperature falls; a cosine to 0 follows for rates."""

    temperature_start: float = 1.0
    """Temperature of the soft assignment at the first step."""
    temperature_end: float = 0.1
    """Temperature of the soft assignment from the end of the warm-up on."""
    affinity_std: float = 0.02
    """Standard deviation of the initial affinities: small against rate times steps, or nothing moves."""
    head_start: float = 1.0
    """Initial affinity of a neuron to its expert in the given partition, where there is one; less than
    affinity_rate times steps, or nothing moves."""
    rounding: str = "exact"
    """How a soft assignment becomes a hard one: exact, or greedy as published (and about 20 times slower)."""
    average: float = 0.98
    """Decay per step of the average of hard assignments that is frozen in the end."""
    freeze_at: float = 0.72
    """Share of the steps after which the partition is frozen while routers train on; 1 never freezes it."""
    estimator: str = "soft_topk"
    """Gradient of the choice of experts while the partition is learned: soft_topk, softmax or sigmoid."""
    settled_estimator: str = "soft_topk"
    """The same once the partition is frozen, or fixed from the start."""
    router_temperature: float = 0.1
    """Temperature of soft_topk, in units of the routers' logits; those of ridge routers have deviation 1."""

    checkpoint_every: int = 50
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("kl", "ce", "z", "balance", "weight_decay", "affinity_std", "head_start"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("affinity_rate", "router_rate", "weight_rate", "warmup", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("temperature_start", "temperature_end", "router_temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.freeze_at <= 1:
            raise ValueError(f"freeze_at must be a share of the steps in (0, 1], got {self.freeze_at}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 step, got {self.checkpoint_every}")

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up."""
        return round(self.warmup * steps)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) as a share of the peak.

        Linear to 1 at the last step of the warm-up, then ``(1 + cos(pi p)) / 2``, p the share done of what
        remains; the last step still moves.

        Examples:
            >>> from monge.conversion.alignment import AlignmentConfig
            >>> [round(AlignmentConfig().rate(step, 100), 3) for step in (0, 19, 20, 60, 99)]
            [0.05, 1.0, 1.0, 0.5, 0.0]
        """
        warmup = self.warmup_steps(steps)
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    def temperature(self, step: int, steps: int) -> float:
        """Temperature of step ``step`` (from 0): linear from start to end over the warm-up."""
        done = min(1.0, step / max(1, self.warmup_steps(steps)))
        return self.temperature_start + done * (self.temperature_end - self.temperature_start)

    def freeze_step(self, steps: int) -> int:
        """The step (from 0) before which the partition is frozen; ``steps`` if it never is."""
        return round(self.freeze_at * steps)


PAPER = AlignmentConfig(
    affinity_rate=5e-4,
    router_rate=5e-4,
    rounding="greedy",
    freeze_at=1.0,
    estimator="softmax",
    settled_estimator="softmax",
)
"""DOT-MoE as published (arXiv 2606.01666): one rate for both, greedy rounding, softmax estimator throughout.

It is meant for thousands of steps of a hundred thousand tokens each.
"""
