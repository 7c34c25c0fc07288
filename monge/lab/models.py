"""transformers' own tiny Llama, its MLPs replaced by `monge.MoE`: the model of every run.

What is compared is the router alone: for one seed every weight that two models share starts the same, experts
and router weights included, and the dense baseline has the active FLOPs of the MoE.

Shapes: E experts, H width, I expert width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from monge.lab.presets import DENSE, CompareConfig
from monge.moe import MoE

# Standard deviations of the initial weights, the first name that fits; all other matrices have transformers'
# default. With 0.02 everywhere gradients start so weak that 300 steps leave the experts behind dense layers.
INITIAL_STD = {"embed_tokens": 0.1, ".mlp.router.": 0.01, "down_proj": 0.03, ".mlp.": 0.06}
DEFAULT_STD = 0.02


def build_model(router: str, config: CompareConfig, seed: int) -> nn.Module:
    """A `LlamaForCausalLM` whose MLPs route by `router`, or the dense baseline for ``"dense"``.

    Random state is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _llama(config)
        if router != DENSE:
            for index, layer in enumerate(model.model.layers):
                layer.mlp = MoE(
                    config.width,
                    config.expert_width,
                    config.experts,
                    config.top_k,
                    router=router,
                    router_options={"layer": index, "seed": seed, **router_options(router, config)},
                )
        _initialise(model, seed)
    return model.to(config.device)


def router_options(router: str, config: CompareConfig) -> dict[str, Any]:
    """The options of `router` that the experiment sets; all others keep their defaults."""
    return {"p": config.ssr_probability} if router == "ssr" else {}


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


def parameter_counts(model: nn.Module, config: CompareConfig) -> tuple[int, int]:
    """All parameters, and those that process one token: of the experts' only ``top_k / experts``."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if _is_expert(name))
    return total, total - experts + experts * config.top_k // config.experts


def _llama(config: CompareConfig) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("the lab's models need `pip install 'monge[lab]'`.") from error
    return LlamaForCausalLM(
        LlamaConfig(
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
