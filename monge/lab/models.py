"""The model of every run: transformers' own tiny Llama (or ViT), its MLPs replaced by `monge.MoE`.

What is compared is the router alone: for one seed every weight that two models share starts the same, experts
and router weights included, and the dense baseline has the active FLOPs of the MoE.

Shapes: E experts, H width, I expert width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monge.lab.config import CompareConfig, ExperimentConfig
from monge.lab.routers import DENSE, RouterSpec, parse_router
from monge.moe import MoE
from monge.routing import router_options as options_of

# Standard deviations of the initial weights, the first name that fits; all other matrices have transformers'
# default. With 0.02 everywhere gradients start so weak that 300 steps leave the experts behind dense layers.
INITIAL_STD = {"embed_tokens": 0.1, ".mlp.router.": 0.01, "down_proj": 0.03, ".fc2.": 0.03, ".mlp.": 0.06}
DEFAULT_STD = 0.02


class ImageShape(NamedTuple):
    """What a classifier must know of its images."""

    channels: int
    size: int
    classes: int


def build_model(
    router: str, config: ExperimentConfig, seed: int, images: ImageShape | None = None
) -> nn.Module:
    """A model whose MLPs route by `router`, or the dense baseline for ``"dense"``.

    A `LlamaForCausalLM`, or for ``images`` a `ViTForImageClassification`. Random state is left as it was
    found.

    Raises:
        ValueError: the router cannot be made with these options.
    """
    spec = parse_router(router)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, blocks, activation = _llama(config) if images is None else _vit(config, images)
        if spec.name != DENSE:
            for index, block in enumerate(blocks):
                block.mlp = _moe(spec, config, index, seed, activation)
        _initialise(model, seed)
    return model.to(config.device)


def router_options(spec: RouterSpec, config: ExperimentConfig) -> dict[str, Any]:
    """The options of a router that differ from its defaults: the experiment's, and over them the spelled
    ones.

    Raises:
        ValueError: the router has no such option.
    """
    ours: dict[str, Any] = {}
    if spec.name == "ssr":
        ours["p"] = config.ssr_probability
    if spec.options.get("gates") == "annealed":
        ours["anneal_steps"] = max(1, round(config.annealing * config.steps))
    if config.router_bias:
        ours["bias"] = True
    known = [name for name in options_of(spec.name) if name not in ("device", "dtype")]
    spelled = {name: value for name, value in spec.options.items() if name in known}
    unknown = sorted(spec.options.keys() - spelled.keys() - {"capacity_factor"})
    if unknown:
        raise ValueError(
            f"routers: {spec.name!r} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(known)}, and capacity_factor of the layer."
        )
    return ours | spelled


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The model's MoE layers by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode inside, as it was outside."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def static_capacity(model: nn.Module, factor: float | None) -> Iterator[None]:
    """Inside, every layer drops the slots beyond ``factor`` times an equal share; None drops none."""
    layers = list(moe_layers(model).values())
    before = [layer.capacity_factor for layer in layers]
    try:
        for layer in layers:
            layer.capacity_factor = factor
        yield
    finally:
        for layer, value in zip(layers, before):
            layer.capacity_factor = value


def parameter_counts(model: nn.Module, config: ExperimentConfig) -> tuple[int, int]:
    """All parameters, and those that process one token: of the experts' only ``top_k / experts``."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if _is_expert(name))
    return total, total - experts + experts * config.top_k // config.experts


def _moe(spec: RouterSpec, config: ExperimentConfig, layer: int, seed: int, activation: str) -> MoE:
    options = router_options(spec, config)
    of_layer = spec.options.get("capacity_factor") if "capacity_factor" not in options else None
    try:
        moe = MoE(
            config.width, config.expert_width, config.experts, config.top_k, router=spec.name,
            router_options={"layer": layer, "seed": seed, **options},
            capacity_factor=of_layer, activation=activation,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"routers: {spec.text!r} cannot be made: {error}") from error
    if config.router_bias:
        bias = moe.router.bias
        assert bias is not None
        with torch.no_grad():
            bias[: config.biased_experts] = config.router_bias
    return moe


def _llama(config: ExperimentConfig) -> tuple[Any, Any, str]:
    """The model, its blocks, and the activation of its MLPs."""
    assert isinstance(config, CompareConfig)
    transformers = _library()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.top_k * config.expert_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context,
            initializer_range=DEFAULT_STD,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    return model, model.model.layers, "swiglu"


def _vit(config: ExperimentConfig, images: ImageShape) -> tuple[Any, Any, str]:
    transformers = _library()
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=config.width,
            intermediate_size=config.top_k * config.expert_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=DEFAULT_STD,
            image_size=images.size,
            patch_size=config.patch,  # type: ignore[attr-defined]
            num_channels=images.channels,
            num_labels=images.classes,
        )
    )
    return model, model.vit.layers, "gelu"


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the lab's models need `pip install 'monge[lab]'`.") from error
    return transformers


@torch.no_grad()
def _initialise(model: nn.Module, seed: int) -> None:
    """Draw every matrix from a generator seeded by its name: its values do not depend on what else there is.

    Vectors (norms) and what routers add of their own keep the values they were made with.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (".mlp.router." in name and not name.endswith("router.weight")):
            continue
        std = next((std for part, std in INITIAL_STD.items() if part in name), DEFAULT_STD)
        parameter.copy_(std * _normal(parameter.shape, f"{seed}/{name}"))


def _normal(shape: torch.Size, key: str) -> Tensor:
    """Standard normal numbers that depend on nothing but `key`."""
    entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(entropy)
    return torch.randn(shape, generator=generator)


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name
