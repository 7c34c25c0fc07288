"""What an audit found: one `LayerAudit` per mixture layer, and the `AuditReport` of the model.

Shapes: E experts, K slots per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerAudit:
    """One mixture layer, in evaluation mode unless said otherwise.

    Attributes:
        layer, name: the first number in the path of the layer, and the path.
        num_experts, top_k: E and K.
        load: slots on each expert.
        routing_entropy: entropy of softmax(logits) over experts, mean over tokens, nats; None where the
            router does not show its logits.
        duplicates: pairs of experts whose outputs on the same tokens differ by less than 5% of their norm.
        closest: the smallest such difference of two experts, relative; 0 is a copy.
        information: mutual information of a slot's expert and its text's domain, nats; None with one domain.
        information_chance: the same when whole sequences are dealt to the domains at random.
        drops: capacity factor -> share of the slots that a static capacity ceil(cf T K / E) would drop.
        flips: share of the slots whose expert changes when the whole model computes in the other precision.
        batch_dependence: share of the slots whose expert changes when a sequence is run alone.
        leak: share of the slots in the first half of a sequence whose expert changes when the second half is
            replaced.
        batch_dependence_training, leak_training: the same with the routes that the router takes in training;
            None where the routers are not Monge's, which route alike in both modes.
    """

    layer: int
    name: str
    num_experts: int
    top_k: int
    load: list[int]
    routing_entropy: float | None
    duplicates: list[tuple[int, int]]
    closest: float
    information: float | None
    information_chance: float | None
    drops: dict[float, float]
    flips: float | None
    batch_dependence: float
    leak: float
    batch_dependence_training: float | None
    leak_training: float | None

    @property
    def max_violation(self) -> float:
        """Largest load over the mean load, minus one."""
        total = sum(self.load)
        return max(self.load) * self.num_experts / total - 1 if total else 0.0

    @property
    def dead(self) -> list[int]:
        """Experts that no token took."""
        return [expert for expert, load in enumerate(self.load) if load == 0]

    @property
    def load_entropy(self) -> float:
        """Entropy of the shares of the load, nats; ln E is balanced."""
        total = max(sum(self.load), 1)
        return -sum(n / total * math.log(n / total) for n in self.load if n)


@dataclass(frozen=True)
class AuditReport:
    """What `monge.audit` found.

    Attributes:
        layers: one per mixture layer, in the order of the model.
        tokens, sequences: how much text.
        domains: domain -> mean loss in nats per predicted token.
        losses: experts more or less than K per token -> mean loss; 0 is the model as it is.
        precision: the precision that ``flips`` compares with, such as "bfloat16", or None if not asked.
        loss_precision: mean loss in that precision, on the sequences of the checks.
        loss_checked: mean loss as the model is, on the same sequences.
        loss_stock: mean loss of the same routed by transformers alone, where `monge.hf.use_router` was at
            work, else None.
    """

    layers: tuple[LayerAudit, ...]
    tokens: int
    sequences: int
    domains: dict[str, float]
    losses: dict[int, float]
    precision: str | None
    loss_precision: float | None
    loss_checked: float
    loss_stock: float | None

    def summary(self) -> dict[str, Any]:
        """Plain numbers of the whole model: sums of counts, means over layers of the rest."""

        def mean(values: Iterator[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else None

        layers = self.layers
        return {
            "layers": len(layers),
            "experts": sum(layer.num_experts for layer in layers),
            "tokens": self.tokens,
            "sequences": self.sequences,
            "loss": self.losses[0],
            "perplexity": math.exp(min(self.losses[0], 700)),
            "losses": {f"{offset:+d}" if offset else "0": loss for offset, loss in self.losses.items()},
            "domains": self.domains,
            "max_violation": mean(layer.max_violation for layer in layers),
            "dead_experts": sum(len(layer.dead) for layer in layers),
            "duplicate_pairs": sum(len(layer.duplicates) for layer in layers),
            "load_entropy": mean(
                layer.load_entropy / math.log(max(layer.num_experts, 2)) for layer in layers
            ),
            "routing_entropy": mean(layer.routing_entropy for layer in layers),
            "information": mean(layer.information for layer in layers),
            "information_chance": mean(layer.information_chance for layer in layers),
            "drops": {
                f"{factor:g}": mean(layer.drops[factor] for layer in layers) for factor in layers[0].drops
            },
            "precision": self.precision,
            "flips": mean(layer.flips for layer in layers),
            "loss_precision": self.loss_precision,
            "loss_checked": self.loss_checked,
            "loss_stock": self.loss_stock,
            "batch_dependence": mean(layer.batch_dependence for layer in layers),
            "leak": mean(layer.leak for layer in layers),
            "batch_dependence_training": mean(layer.batch_dependence_training for layer in layers),
            "leak_training": mean(layer.leak_training for layer in layers),
        }

    def records(self) -> list[dict[str, Any]]:
        """One JSON object per layer, of kind ``audit_layer``."""
        return [
            {
                "kind": "audit_layer",
                **asdict(layer),
                "duplicates": [list(pair) for pair in layer.duplicates],
                "drops": {f"{factor:g}": share for factor, share in layer.drops.items()},
                "max_violation": layer.max_violation,
                "dead": layer.dead,
                "load_entropy": layer.load_entropy,
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        titles = f"{'layer':>5} {'experts':>7} {'imbalance':>9} {'dead':>4} {'copies':>6} {'leak':>6}"
        lines = [
            f"{one.layer:>5} {one.num_experts:>7} {one.max_violation:>9.2f} {len(one.dead):>4} "
            f"{len(one.duplicates):>6} {one.leak:>6.3f}"
            for one in self.layers
        ]
        losses = ", ".join(f"k{offset:+d}: {loss:.4f}" for offset, loss in sorted(self.losses.items()))
        return "\n".join([titles, *lines, f"{self.tokens} tokens, loss {losses}"])
