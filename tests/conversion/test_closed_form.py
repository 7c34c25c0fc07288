"""The layer-by-layer conversion: every expert on is dense, resumption is exact, the refit helps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from monge import MoE
from monge.conversion.closed_form import convert_layers
from monge.conversion.config import ConvertConfig
from monge.conversion.ffn import find_ffns
from monge.conversion.observer import Silent
from monge.conversion.partition import METHODS
from monge.conversion.stages import Stages

CONFIG = ConvertConfig(experts=6, ffn_active=0.5, shared=0.34, threads=1, length=16)


def tokens(model, count=24):
    if hasattr(model.config, "image_size"):
        return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.randint(0, model.config.vocab_size, (count, 16), generator=torch.Generator().manual_seed(0))


def convert(model, config=CONFIG, stages=None, observer=None, importance=None, given=None):
    rows = []
    convert_layers(
        model,
        find_ffns(model),
        tokens(model),
        config,
        stages or Stages(None),
        gates="binary" if config.gates == "binary" else "standard",
        given=given or {},
        importance=importance or {},
        observer=observer or Silent(),
        record=rows.append,
    )
    return rows


def out_of(model, inputs):
    with torch.no_grad():
        found = model(inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3", "bert", "gpt2", "vit"],
)
def test_all_experts_on_without_refit_is_the_dense_model(tiny_model, family):
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    # binary gates: the chosen experts are summed with weight 1
    rows = convert(model, replace(CONFIG, ffn_active=1.0, refit=False, gates="binary"))
    assert sum(isinstance(module, MoE) for module in model.modules()) == len(rows) == 3
    inputs = tokens(model, 3)
    torch.testing.assert_close(out_of(model, inputs), out_of(dense, inputs), rtol=1e-4, atol=1e-4)
    assert all(row["error"] < 1e-4 for row in rows)


LAYER_LOCAL = [name for name, method in METHODS.items() if method.function and not method.needs_gradients]


@pytest.mark.parametrize("method", LAYER_LOCAL)
def test_every_method_converts_and_the_refit_lowers_the_held_out_error(tiny_model, method):
    model = tiny_model("llama")
    rows = convert(model, replace(CONFIG, method=method))
    assert all(row["error"] <= row["error_before_refit"] for row in rows)
    assert torch.isfinite(out_of(model, tokens(model, 2))).all()
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    assert len(moes) == (0 if METHODS[method].dense else 3)
    if METHODS[method].dense:
        assert model.model.layers[0].mlp.up_proj.weight.shape[0] == 24


class Stop(Exception):
    pass


class StopsAt(Silent):
    """Interrupts after so many layers."""

    def __init__(self, layers):
        self.left = layers

    def advance(self, steps=1, note=""):
        if note:
            self.left -= 1
            if self.left == 0:
                raise Stop


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_interrupted_conversion_goes_on_to_the_same_bits(tiny_model, tmp_path, family):
    whole = tiny_model(family)
    rows = convert(whole)
    stages = Stages(tmp_path)
    for layers in (1, 1):
        with pytest.raises(Stop):
            convert(tiny_model(family), stages=stages, observer=StopsAt(layers))
    resumed = tiny_model(family)
    again = convert(resumed, stages=stages)
    assert [row["layer"] for row in again] == [2]
    assert again[0]["error"] == rows[2]["error"]
    for (name, a), (other, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_layers_that_are_not_named_stay_dense(tiny_model):
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    rows = convert(model, replace(CONFIG, layers=(1,)))
    assert [row["layer"] for row in rows] == [1]
    assert not isinstance(model.model.layers[0].mlp, MoE)
    assert isinstance(model.model.layers[1].mlp, MoE)
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, dense.model.layers[2].mlp.up_proj.weight)
    with pytest.raises(ValueError, match=r"layers names \[7\]"):
        convert(tiny_model("llama"), replace(CONFIG, layers=(7,)))


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_stage_file_is_named(tiny_model, tmp_path, damage):
    stages = Stages(tmp_path)
    with pytest.raises(Stop):
        convert(tiny_model("llama"), stages=stages, observer=StopsAt(2))
    if damage is None:
        (tmp_path / "layer-000.safetensors").unlink()
    else:
        (tmp_path / "layer-000.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match=r"(damaged|missing).*[Dd]elete"):
        convert(tiny_model("llama"), stages=stages)


def test_more_experts_than_neurons_are_refused(tiny_model):
    with pytest.raises(ValueError, match="48 neurons cannot be divided into experts=64"):
        convert(tiny_model("llama"), replace(CONFIG, experts=64))


def test_an_analytic_router_is_only_for_methods_that_have_one(tiny_model):
    with pytest.raises(ValueError, match=r"'random' has no analytic router.*cmoe"):
        convert(tiny_model("llama"), replace(CONFIG, method="random", router="analytic"))
    assert convert(tiny_model("llama"), replace(CONFIG, method="weight_kmeans", router="analytic"))
