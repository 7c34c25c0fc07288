"""Which target an export takes, and what is said where one cannot hold the model."""

from __future__ import annotations

import pytest
import torch
from converted_models import convert_by_hand

from monge.conversion.exporting import export
from monge.conversion.exporting.choice import choose_target, suited_gates
from monge.conversion.exporting.structure import Structure
from monge.conversion.types import ExpertShape

ROUTED = {"shared": 0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
LATER = "dense layers after converted ones; layers that stayed dense; shared experts"


@pytest.fixture
def structure(tiny_model, tiny_inputs):
    def make(family, how=None, **config):
        model = tiny_model(family, **config)
        return Structure(convert_by_hand(model, tiny_inputs(model), **(how or {})))

    return make


def one_more(layer: int, shape: ExpertShape) -> ExpertShape:
    """Layer 1 takes one expert more."""
    return shape._replace(active=shape.active + (layer == 1))


@pytest.mark.parametrize(
    ("family", "how", "config", "target"),
    [
        ("llama", {"shape_of": one_more}, {}, "monge"),
        ("llama", {"gates": "sigmoid"}, {}, "monge"),
        ("llama", {"gates": "sigmoid", "active": 3}, {}, "granitemoeshared"),  # one gate is 1 in any case
        ("llama", {}, {"mlp_bias": True}, "monge"),
        ("llama", {"layers": [0]}, {"mlp_bias": True}, "monge"),
        ("llama", {**ROUTED, "layers": [1], "gates": "binary"}, {}, "monge"),
        ("llama", ROUTED, {"attention_bias": True}, "granitemoe"),
        ("llama", {"layers": [0]}, {"attention_bias": True}, "monge"),
        ("llama", {}, {"hidden_act": "gelu"}, "granitemoeshared"),
        ("mistral", {"gates": "binary"}, {"sliding_window": 8}, "monge"),
        ("mistral", ROUTED, {"sliding_window": None}, "mixtral"),
        ("qwen3", {}, {}, "monge"),
        ("qwen3", {**ROUTED, "gates": "binary"}, {}, "monge"),
        ("qwen3", {"gates": "sigmoid"}, {"attention_bias": True}, "monge"),
        ("qwen3", {"gates": "sigmoid", "layers": [0, 2]}, {}, "monge"),
        ("qwen3", ROUTED, {**WINDOWS, "max_window_layers": 0}, "qwen3_moe"),
        ("qwen3", ROUTED, {**WINDOWS, "max_window_layers": 1}, "monge"),
        ("qwen3", {"groups": 3, "active": 3, "shared": 2, "gates": "sigmoid"}, {}, "monge"),
        ("llama", {"groups": 3, "active": 3, "shared": 2}, {}, "granitemoeshared"),
        ("gemma", {}, {}, "monge"),
        ("gpt2", {}, {}, "monge"),
        ("phi3", {}, {}, "monge"),
    ],
)  # fmt: skip
def test_auto(structure, family, how, config, target):
    assert choose_target(structure(family, how, **config)) == target


@pytest.mark.parametrize(
    ("family", "how", "config", "to", "message"),
    [
        ("llama", {}, {}, "mixtral", "shared experts. Choose to='granitemoeshared' or 'qwen2_moe' or '"),
        ("llama", {"layers": [0]}, {}, "mixtral", LATER),
        ("llama", {**ROUTED, "gates": "binary"}, {}, "mixtral", "binary gates.*to='granitemoe' or 'granite"),
        ("llama", {"shape_of": one_more}, {}, "granitemoeshared", "different shape.*Choose to='monge'$"),
        ("llama", {}, {}, "glm4_moe", "Glm4MoeForCausalLM is built differently"),
        ("llama", {}, {}, "dense", "it has experts"),
        ("mistral", {}, {"sliding_window": 8}, "granitemoeshared", "sliding window.*to='qwen2_moe' or"),
        ("qwen3", {}, {}, "glm4_moe", "gates by a softmax"),
        ("gpt2", {}, {}, "mixtral", "MixtralForCausalLM is built differently. Choose to='monge'"),
        ("llama", {}, {}, "mixtral8x7b", "to must be auto or one of mixtral, .*monge; got 'mixtral8x7b'"),
    ],
)  # fmt: skip
def test_refusals_say_why_and_what_can(structure, family, how, config, to, message):
    with pytest.raises(ValueError, match=message):
        choose_target(structure(family, how, **config), to)


def test_a_dense_model_stays_dense(tiny_model):
    assert choose_target(Structure(tiny_model("llama"))) == "dense"
    with pytest.raises(ValueError, match="none of its FFNs was replaced"):
        choose_target(Structure(tiny_model("llama")), "mixtral")


def test_forcing_a_monge_checkpoint(structure):
    assert choose_target(structure("llama"), "monge") == "monge"


@pytest.mark.parametrize(
    ("model_class", "shared", "gates"),
    [
        ("LlamaForCausalLM", True, "standard"), ("LlamaForCausalLM", False, "standard"),
        ("Qwen2ForCausalLM", True, "standard"), ("GraniteForCausalLM", True, "standard"),
        ("Qwen3ForCausalLM", True, "sigmoid"), ("Qwen3ForCausalLM", False, "standard"),
        ("BertModel", True, "standard"),
    ],
)  # fmt: skip
def test_suited_gates(model_class, shared, gates):
    assert suited_gates(model_class, shared) == gates


def test_a_damaged_model_is_not_written(structure, tmp_path):
    model = structure("llama").model
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        export(model, tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="got dict"):
        export({"model": 1}, tmp_path / "moe")
    with pytest.raises(ValueError, match="got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "moe")


def test_unknown_dtype(structure, tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, float16 .*got 'int8'"):
        export(structure("llama").model, tmp_path / "moe", dtype="int8")
