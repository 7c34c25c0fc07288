"""The plan's numbers: by hand, and those of the model that is really built."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from monge.conversion import ConvertConfig
from monge.conversion.building import make_moe
from monge.conversion.ffn import find_ffns
from monge.conversion.plan import BASE_BYTES, make_plan, measure_speed
from monge.conversion.source import Source
from monge.conversion.types import SHARED, Partition


@pytest.fixture
def make_source(tiny_model, tiny_tokenizer):
    def make(family, **options):
        model = tiny_model(family, **options)
        tokenizer = None if family == "vit" else tiny_tokenizer
        return Source(model, tokenizer, model.config, f"tiny {family}", Path(), "", family != "bert")

    return make


def plan_of(source, speed=1e9, **fields):
    config = ConvertConfig(**{"experts": 8, "tokens": 1024, "length": 32, **fields})
    return make_plan(source, find_ffns(source.model), config, flops_per_second=speed)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_by_hand(make_source):
    plan = plan_of(make_source("llama"))  # H 32, F 48, 3 layers, vocabulary 320, 4 heads of 8, 2 for keys
    attention, norms, ffn = 2 * 32 * 32 + 2 * 16 * 32, 2 * 32, 3 * 32 * 48
    dense = 2 * 320 * 32 + 3 * (attention + norms + ffn) + 32
    assert plan.params_dense == dense
    # 8 groups of 6 neurons, 4 active, 2 of them shared: a shared expert of 12, 6 experts of 6, 2 chosen.
    assert tuple(plan.shape) == (48, 8, 4, 2)
    assert plan.params_total == dense + 3 * 6 * 32  # the routers
    assert plan.params_active == dense + 3 * (6 * 32 - 4 * 6 * 3 * 32)
    assert plan.ffn_active == 0.5
    assert plan.model_active == plan.params_active / dense
    assert plan.flops_dense == 2 * (dense - 320 * 32)  # embeddings are looked up
    assert plan.flops == plan.flops_dense - 2 * 3 * (4 * 6 * 3 * 32 - 6 * 32)
    assert plan.padding == 0
    assert plan.lines()[0] == (
        "tiny llama: 3 of 3 layers by ot_lloyd; 48 neurons become a shared expert of 12 neurons and 6 "
        "experts of 6, 2 of them per token."
    )
    assert plan.lines()[1].startswith("Active per token: 50.0% of the FFN neurons, ")


def test_tied_embeddings_are_counted_once_and_multiplied(make_source):
    tied = plan_of(make_source("llama", tie_word_embeddings=True))
    untied = plan_of(make_source("llama"))
    assert untied.params_dense - tied.params_dense == 320 * 32
    assert tied.flops_dense == untied.flops_dense


def test_smollm2_at_a_quarter():
    """conversion.md's figures: 25 % of the neurons are 56 % of all parameters, 50 % are 70 %."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    one = model.model.layers[:1].to_empty(device="cpu")
    shell = torch.nn.Module()
    shell.layers = torch.nn.ModuleList(one)
    for parameter in shell.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    (ffn,) = find_ffns(shell)
    weights = ffn.read()

    class Same:
        def __init__(self, layer):
            self.layer = layer

        def read(self):
            return weights

    source = Source(model, object(), config, "SmolLM2", Path(), "", True)
    layers = [Same(i) for i in range(30)]
    for share, expected in ((0.25, 0.56), (0.5, 0.707)):
        plan = make_plan(source, layers, ConvertConfig(ffn_active=share), flops_per_second=1e11)
        assert plan.params_dense == 134_515_008
        assert plan.model_active == pytest.approx(expected, abs=5e-4)
        assert 60 < plan.seconds < 15 * 60
        assert plan.peak_memory_bytes < 3e9


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "bert", "gpt2", "vit"])
@pytest.mark.parametrize(
    "fields", [{}, {"experts": 7}, {"shared": 0.0}, {"layers": (1,)}, {"ffn_active": 1.0}]
)
def test_parameters_are_those_of_the_model_that_is_built(family, fields, make_source):
    source = make_source(family)
    config = ConvertConfig(**{"experts": 8, "tokens": 1024, "length": 32, **fields})
    ffns = find_ffns(source.model)
    plan = make_plan(source, ffns, config, flops_per_second=1e9)
    assert plan.params_dense == count(source.model)
    inactive, padding = 0, 0
    for layer in plan.layers:
        shape = config.shape_for(48)
        labels = torch.full((48,), SHARED)
        labels[shape.shared_neurons :] = torch.arange(48 - shape.shared_neurons) % shape.routed
        moe = make_moe(ffns[layer].read(), Partition(labels), shape, torch.randn(shape.routed, 32))
        ffns[layer].install(moe)
        inactive += count(moe.experts) * (shape.routed - shape.top_k) // shape.routed
        padding += shape.routed * shape.expert_neurons - (48 - shape.shared_neurons)
    assert plan.params_total == count(source.model)
    assert plan.params_active == plan.params_total - inactive
    assert plan.padding == padding
    assert ("of padding" in plan.lines()[0]) == (padding > 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_static_pruning_has_no_router_and_no_inactive_weights(family, make_source):
    source = make_source(family)
    plan = plan_of(source, method="static", ffn_active=0.25)
    for ffn in find_ffns(source.model):
        ffn.narrow(ffn.read().select(torch.arange(12)))
    assert plan.params_total == plan.params_active == count(source.model)
    assert plan.ffn_active == 0.25
    assert "the 12 strongest neurons of 48 stay" in plan.lines()[0]


def test_layers_that_stay_dense_are_active_whole(make_source):
    plan = plan_of(make_source("llama"), layers=(2, 0))
    assert plan.layers == (0, 2)
    assert plan.ffn_active == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_estimates_grow_with_what_is_asked_for(make_source):
    source = make_source("llama")
    few, many = plan_of(source), plan_of(source, tokens=2048)
    assert many.seconds > 1.8 * few.seconds
    assert many.peak_memory_bytes > few.peak_memory_bytes > BASE_BYTES
    assert plan_of(source, speed=2e9).seconds == pytest.approx(few.seconds / 2)
    assert plan_of(source, minutes=3.0).seconds == pytest.approx(few.seconds + 180)
    assert plan_of(source, router="trained").seconds > few.seconds
    assert plan_of(source, refit=False).seconds < few.seconds


def test_a_plan_can_be_stored(make_source):
    assert json.loads(json.dumps(asdict(plan_of(make_source("llama")))))["params_total"] > 0


def test_the_speed_is_measured_when_it_is_not_given(make_source):
    assert measure_speed(0.01) > 0
    assert plan_of(make_source("llama"), speed=None).seconds > 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"experts": 49}, r"48 neurons cannot be divided into experts=49: lower"),
        ({"layers": (3,)}, r"layers names \[3\]"),
        ({"length": 600}, r"length=600 exceeds the 512 positions of tiny llama"),
        ({"tokens": 191}, r"tokens=191 are too few .* 48 neurons.*than 192"),
    ],
)
def test_what_the_model_does_not_allow_is_refused(fields, said, make_source):
    with pytest.raises(ValueError, match=said):
        plan_of(make_source("llama"), **fields)
    if "tokens" in fields:
        assert plan_of(make_source("llama"), refit=False, **fields).seconds > 0
