"""No public function hides behind a module of the same name, and the top of the package is small."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types

import pytest
import torch

import monge
from monge.conversion import ConvertConfig


def submodules() -> list[str]:
    return [
        m.name for m in pkgutil.walk_packages(monge.__path__, "monge.") if not m.name.endswith("__main__")
    ]


def test_importing_every_submodule_hides_no_public_name():
    names = {}
    for package in ["monge", *submodules()]:
        names[package] = list(getattr(importlib.import_module(package), "__all__", []))
    for package, public in names.items():
        module = importlib.import_module(package)
        for name in public:
            value = getattr(module, name)
            is_subpackage = package == "monge" and name in {"ot", "routing", "moe", "lab", "hf"}
            assert is_subpackage == isinstance(value, types.ModuleType), (
                f"{package}.{name} is a {type(value)}"
            )


# One call per public name, after every submodule was imported: a module in its place is not callable.
def _model():
    return monge.MoE(8, 16, 4, 2, router="prices")


def _language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    model.model.layers[0].mlp = _model()
    return model


def _convert(folder):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(**sizes, image_size=4, patch_size=2))
    config = ConvertConfig(experts=4, threads=1)
    return monge.convert(vit, config, inputs=torch.randn(64, 3, 4, 4), out=folder)


CALLS = {
    "MoE": _model,
    "Routing": lambda: monge.Routing(
        torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), 1, torch.zeros(1, 1)
    ),
    "make_router": lambda: monge.make_router("topk", dim=8, num_experts=4, top_k=2),
    "audit": lambda: monge.audit(_language_model(), [torch.arange(8).view(2, 4)]),
    "step": lambda: monge.step(_model()),
    "aux_loss": lambda: monge.aux_loss(_model()),
    "watch": lambda: monge.watch(_model()).__enter__(),
}


def test_every_top_level_name_is_called(tmp_path):
    for module in submodules():
        importlib.import_module(module)
    functions = {n for n in monge.__all__ if not isinstance(getattr(monge, n), (types.ModuleType, str))}
    assert functions == {*CALLS, "convert", "export", "load"}
    for call in CALLS.values():
        call()
    converted = _convert(tmp_path / "run")
    assert monge.load(monge.export(converted, tmp_path / "export")) is not None


def test_the_public_surface_is_small():
    assert len(monge.__all__) <= 14


def test_the_binding_signatures_stand():
    from monge import ot

    def names(f):
        return list(inspect.signature(f).parameters)

    assert names(ot.sinkhorn)[:11] == [
        "scores", "epsilon", "row_mass", "col_mass", "mask", "tol", "max_iters", "backward", "noise",
        "generator", "group",
    ]  # fmt: skip
    assert names(ot.assign) == [
        "scores", "k", "capacity", "capacity_factor", "mask", "method", "max_work", "group",
    ]  # fmt: skip
    assert names(ot.soft_topk) == ["scores", "k", "temperature"]
    assert names(ot.balanced_partition) == ["affinity_FE", "method"]
    assert names(monge.MoE.__init__)[1:13] == [
        "dim", "hidden", "num_experts", "top_k", "router", "router_options", "activation", "shared_hidden",
        "capacity_factor", "compute", "device", "dtype",
    ]  # fmt: skip
    assert list(monge.routing.ROUTERS) == [
        "topk", "switch", "noisy_topk", "sigmoid", "lossfree", "quantile", "base", "sbase", "expert_choice",
        "hash", "ssr", "maxscore", "prices",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "optional", ["transformers", "matplotlib", "tokenizers", "tensorboard", "ortools", "scipy"]
)
def test_the_core_does_without_optional_packages(optional):
    """`import monge` and a training step need the core dependencies only."""
    code = (
        f"import sys; sys.modules[{optional!r}] = None\n"
        "import torch, monge\n"
        "layer = monge.MoE(8, 16, 4, 2)\n"
        "layer(torch.randn(6, 8)).sum().backward(); monge.step(layer)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
