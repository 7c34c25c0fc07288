"""The audit against models whose routing is known exactly."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from sklearn.metrics import mutual_info_score

import monge
from monge.auditing.measures import (
    duplicates_of,
    information_of,
    mutual_information,
    output_differences,
)
from monge.hf.router import adapters

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
from hf_models import FAMILIES, VOCAB, tiny, tokens

TEXT = {"one": [tokens(4, 12, seed) for seed in range(2)], "two": [tokens(4, 12, 9)]}


def routed_by_token(model, choice):
    """Make every router choose by the token id alone: ``choice`` (V, E) are its logits."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()  # the stream is the embedding alone
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, : choice.shape[1]] = 30 * torch.eye(choice.shape[1])
        model.model.embed_tokens.weight.copy_(torch.randn(VOCAB, 16) * 1e-3)
        model.model.embed_tokens.weight[:, : choice.shape[1]] = choice
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sums_up(family):
    model = tiny(family)
    report = monge.audit(model, TEXT)
    assert all(not module.training for module in model.modules())
    for layer in report.layers:
        assert sum(layer.load) == 3 * 4 * 12 * 2
        assert layer.max_violation == pytest.approx(max(layer.load) / (sum(layer.load) / 4) - 1)
        # in evaluation no route of a per-token router depends on anything else
        assert layer.batch_dependence == layer.leak == 0
        assert layer.leak_training is None
        assert 0 <= layer.routing_entropy <= math.log(4) + 1e-6
        assert 0 <= layer.drops[1.25] <= layer.drops[1.0] <= 1
        assert layer.flips is not None
    summary = report.summary()
    assert json.loads(json.dumps(summary))["tokens"] == 144
    assert set(summary["losses"]) == {"-1", "0", "+1"}
    ids = torch.cat([ids for batches in TEXT.values() for ids in batches])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert summary["loss"] == pytest.approx(float(loss), abs=1e-4)
    weights = [len(batches) for batches in TEXT.values()]
    assert summary["loss"] == pytest.approx(
        sum(w * loss for w, loss in zip(weights, report.domains.values())) / sum(weights), abs=1e-6
    )
    assert str(report).count("\n") == len(report.layers) + 1


def test_loads_domains_and_drops_of_a_known_routing():
    """Even tokens go to experts 0 and 1, odd ones to 2 and 3; the domains are even and odd tokens."""
    choice = torch.zeros(VOCAB, 4)
    choice[::2, :2], choice[1::2, 2:] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])
    model = routed_by_token(tiny("Mixtral"), choice)
    even, odd = tokens(4, 12, 1) // 2 * 2, tokens(4, 12, 2) // 2 * 2 + 1
    layer = monge.audit(model, {"even": [even], "odd": [odd]}).layers[0]
    assert layer.load == [48, 48, 48, 48]
    assert layer.information == pytest.approx(math.log(2))
    assert layer.information_chance < 0.4
    assert layer.drops == {1.0: 0.5, 1.25: 0.375}  # of 96 slots, 24 (30) fit on each of two experts
    mixed = torch.stack([torch.stack([even[0], odd[0]], 1).flatten()] * 2)
    one = monge.audit(model, [mixed]).layers[0]
    assert (one.information, one.information_chance, one.drops[1.0], one.dead) == (None, None, 0.0, [])
    alone = monge.audit(model, [even])
    assert alone.layers[0].dead == [2, 3]
    assert alone.layers[0].max_violation == 1.0
    assert alone.summary()["dead_experts"] == 4


def test_what_training_leaks():
    """MaxScore looks at the batch, expert choice too; carried prices do not."""
    for name, leaks in (("maxscore", True), ("expert_choice", True), ("prices", False), ("ssr", True)):
        options = {"p": 1.0} if name == "ssr" else {}
        model = monge.hf.use_router(tiny("Mixtral"), name, **options)
        layer = monge.audit(model, TEXT, precision=False).layers[0]
        assert layer.leak == layer.batch_dependence == 0
        assert (layer.leak_training > 0) == (layer.batch_dependence_training > 0) == leaks, name
        assert layer.flips is None
        assert not next(adapters(model)).router.route_as_in_training
    batch_only = monge.hf.use_router(tiny("Mixtral"), "expert_choice", per_token_eval=False)
    assert monge.audit(batch_only, TEXT).layers[0].leak > 0


def test_copies_are_found_whatever_the_order_of_their_neurons():
    model = tiny("Qwen3Moe")
    experts = model.model.layers[1].mlp.experts
    order = torch.randperm(8)
    with torch.no_grad():
        gate, up = experts.gate_up_proj[0].chunk(2)
        experts.gate_up_proj[3] = torch.cat([gate[order], up[order]])
        experts.down_proj[3] = experts.down_proj[0][:, order]
    first, second = monge.audit(model, TEXT).layers
    assert (first.duplicates, second.duplicates) == ([], [(0, 3)])
    assert second.closest < 1e-5 < first.closest


def test_flips_in_the_other_precision():
    """Two experts whose logits differ by less than bfloat16 can tell: the routes are a matter of rounding."""
    model = tiny("Mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight[1:] = weight[0] + 1e-4 * torch.randn(3, 16)
    close = monge.audit(model, TEXT)
    assert close.precision == "bfloat16"
    assert close.layers[0].flips > 0.2
    apart = monge.audit(tiny("Mixtral"), TEXT)
    assert apart.layers[0].flips < 0.1
    assert monge.audit(tiny("Mixtral").to(torch.bfloat16), TEXT).precision == "float32"
    assert next(model.parameters()).dtype == torch.float32


def test_a_layer_of_monge_in_a_model_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    model.model.layers[0].mlp = monge.MoE(16, 8, 4, 2, router="maxscore")
    model.train()
    report = monge.audit(model, TEXT)
    assert model.training
    assert report.layers[0].leak_training > 0
    assert report.layers[0].name == "model.layers.0.mlp"
    assert report.loss_stock is None  # transformers alone could not run it
    with pytest.raises(ValueError, match="has no mixture layers"):
        monge.audit(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)), TEXT)


def test_one_expert_less_and_more_only_where_there_are_as_many():
    report = monge.audit(tiny("Mixtral", num_experts_per_tok=1), TEXT)
    assert set(report.losses) == {0, 1}
    everything = monge.audit(tiny("Mixtral", num_experts_per_tok=4), TEXT)
    assert set(everything.losses) == {-1, 0}
    assert everything.layers[0].max_violation == 0


def test_repeatable_and_without_a_trace():
    model = tiny("Olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports = [monge.audit(model, TEXT) for _ in range(2)]
    assert reports[0] == reports[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "has no batches"),
        ({"a": [tokens(2, 8)], "b": []}, {}, "domain 'b' has no batches"),
        ([tokens(1, 8)], {}, "at least two sequences"),
        ([tokens(2, 1)], {}, "S at least 2"),
        ([torch.randn(2, 8)], {}, "token ids"),
        ([tokens(2, 8)], {"capacity_factors": (1, 0)}, "must be positive, got 0"),
    ],
)
def test_bad_input(batches, options, message):
    with pytest.raises(ValueError, match=message):
        monge.audit(tiny("Mixtral"), batches, **options)


def test_mutual_information_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    domains = torch.randint(3, (500,), generator=generator)
    experts = (domains + torch.randint(3, (500,), generator=generator)) % 5
    table = torch.zeros(3, 5).index_put_((domains, experts), torch.ones(500), accumulate=True)
    assert mutual_information(table) == pytest.approx(mutual_info_score(domains, experts), abs=1e-9)
    assert mutual_information(torch.zeros(3, 5)) == 0


def test_chance_is_what_shuffled_sequences_give():
    loads = torch.zeros(8, 4)
    loads[torch.arange(8), torch.arange(8) % 4] = 10  # every sequence uses one expert; domains do not matter
    found, chance = information_of(loads, torch.arange(8) // 4, 2)
    assert found == 0
    assert chance > 0.1
    assert information_of(loads, torch.arange(8) // 4, 2) == (found, chance)


def test_differences_of_outputs():
    outputs = torch.randn(4, 6, 5)
    outputs[1] = outputs[0]
    outputs[2] = outputs[3] = 0  # padding: two experts of zeros are copies
    differences = output_differences(outputs)
    assert differences[0, 1] == differences[2, 3] == 0
    assert differences[0, 2] == 1  # the other's whole norm
    assert duplicates_of(differences) == [(0, 1), (2, 3)]
    assert torch.isinf(differences.diagonal()).all()
