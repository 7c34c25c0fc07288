"""Routers of Monge inside transformers' models: nothing that transformers does stops working."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hf_models import FAMILIES, SIGMOID, tiny, tokens, train

import monge
from monge.hf.router import adapters
from monge.routing import ROUTERS, Router

EVERY = pytest.mark.parametrize("family", FAMILIES)


@EVERY
def test_topk_is_the_architecture_itself_with_its_gradients(family):
    """The oracle: transformers' own router, in float64."""
    stock, ours = tiny(family).double().train(), tiny(family).double().train()
    for model in (stock, ours):
        model.set_experts_implementation("eager")  # the only one for float64
    monge.hf.use_router(ours, "topk")
    ids = tokens()
    outputs = [model(ids, labels=ids) for model in (stock, ours)]
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=0)  # stock gates are float32
    for out in outputs:
        out.loss.backward()
    ours_by_name = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.allclose(parameter.grad, ours_by_name[name].grad, atol=1e-5, rtol=1e-4), name


@EVERY
def test_router_logits_and_the_stock_auxiliary_loss(family):
    model = tiny(family)
    ids = tokens()
    model(ids, output_router_logits=True)  # transformers hangs its recorders on now, before the change
    before = model(ids, labels=ids, output_router_logits=True)
    monge.hf.use_router(model, "prices")
    after = model(ids, labels=ids, output_router_logits=True)
    layers = len(list(adapters(model)))
    assert len(after.router_logits) == len(before.router_logits) == layers
    assert torch.allclose(after.router_logits[0], before.router_logits[0], atol=1e-5)
    if getattr(before, "aux_loss", None) is not None:
        assert after.aux_loss > 0
        plain = model(ids, labels=ids).loss
        coefficient = model.config.router_aux_loss_coef
        assert torch.allclose(after.loss, plain + coefficient * after.aux_loss)
    fresh = monge.hf.use_router(tiny(family), "prices")  # and recorders that come after the change
    assert len(fresh(ids, output_router_logits=True).router_logits) == layers


@EVERY
@pytest.mark.parametrize("name", ["ssr", "maxscore", "prices"])
def test_gradient_checkpointing_changes_nothing(family, name):
    ids, mask = tokens(), torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0  # padding must be known when a layer is computed again
    options = {"p": 1.0} if name == "ssr" else {}
    found = []
    for checkpointed in (False, True):
        model = monge.hf.use_router(tiny(family), name, **options).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        collected = [gate.router.collected.clone() for gate in adapters(model)]
        found.append(([p.grad for p in model.parameters()], collected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][0], found[1][0]))
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))  # nothing counted twice


@EVERY
def test_padding_takes_no_expert_and_counts_nowhere(family):
    ids = tokens(batch=2, length=8)
    padded = torch.cat([ids, tokens(batch=2, length=5, seed=9)], dim=1)
    mask = torch.tensor([[1] * 8 + [0] * 5] * 2)
    found = []
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        model = monge.hf.use_router(tiny(family), "maxscore").train()
        with monge.watch(model) as w:
            logits = model(**inputs).logits[:, :8]
        loads = [layer["loads"] for layer in w.metrics()["layers"].values()]
        found.append((logits, loads, [gate.router.collected for gate in adapters(model)]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][1] == found[1][1]
    assert sum(found[0][1][0]) == 2 * 8 * 2
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[0][2], found[1][2]))


SOME = ("switch", "ssr", "maxscore", "prices")


@EVERY
@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ROUTERS]
)
def test_training_and_the_calls_of_monge(family, name):
    model = tiny(family)
    keys = set(model.state_dict())
    assert monge.hf.use_router(model, name) is model
    with monge.watch(model) as w:
        train(model)
    assert set(model.state_dict()) == keys
    layers = list(adapters(model))
    total = w.metrics()["total"]
    assert len(w.routings) == len(layers)
    assert total["tokens"] == 90  # 3 steps of 30
    for gate in layers:
        assert gate.router.weight is gate.weight
        if hasattr(gate.router, "steps"):
            assert int(gate.router.steps) == 3
    if name in ("switch", "noisy_topk"):
        model.train()
        model(tokens())
        assert float(monge.aux_loss(model)) > 0


@EVERY
@pytest.mark.parametrize("name", ["prices", "maxscore", "expert_choice"])
def test_generate_with_and_without_a_cache(family, name):
    model = monge.hf.use_router(tiny(family), name)
    train(model)
    prompt = tokens(batch=2, length=4)
    mask = torch.ones_like(prompt)
    mask[1, 0] = 0
    ask = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **ask)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **ask))


@pytest.mark.parametrize("family", SIGMOID)
@pytest.mark.parametrize("name", ["lossfree", "quantile", "prices"])
def test_the_architectures_own_bias_holds_the_prices(family, name):
    model = tiny(family)
    bias = torch.tensor([0.3, 0.0, -0.1, 0.05])
    gate = next(m for m in model.modules() if hasattr(m, "e_score_correction_bias"))
    gate.e_score_correction_bias.copy_(bias)
    ids = tokens()
    before = model(ids).logits
    monge.hf.use_router(model, name)
    assert torch.allclose(gate.router.prices, -bias)  # a pretrained bias is where the prices start
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    train(model)
    assert not torch.equal(gate.router.prices, -bias)
    state = model.state_dict()
    key = next(key for key in state if key.endswith("e_score_correction_bias"))
    assert torch.equal(state[key], -gate.router.prices)
    other = monge.hf.use_router(tiny(family, seed=5), name)
    other.load_state_dict(state)  # strict: no key is missing, none left over
    assert torch.equal(next(adapters(other)).router.prices, gate.router.prices)
    assert torch.allclose(other(ids).logits, model(ids).logits)


def test_a_bias_that_the_method_does_not_use_becomes_zero_and_a_group_limit_is_lifted():
    model = tiny("DeepseekV3", n_routed_experts=8, n_group=4, topk_group=2)
    gate = next(m for m in model.modules() if hasattr(m, "e_score_correction_bias"))
    gate.e_score_correction_bias.fill_(0.5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monge.hf.use_router(model, "ssr")
    assert {"e_score_correction_bias" in str(w.message) for w in told} == {True, False}
    assert not gate.e_score_correction_bias.any()
    assert (gate.num_group, gate.topk_group, model.config.n_group, model.config.topk_group) == (1, 1, 1, 1)
    ids = tokens()
    with monge.hf.stock_inference(model):
        stock = model(ids).logits
    assert torch.allclose(stock, model(ids).logits, atol=1e-5)


def test_gates_are_the_architectures_own_unless_they_are_the_method():
    """OLMoE does not renormalise: the gates of a token are its softmax probabilities, sum below one."""
    model = monge.hf.use_router(tiny("Olmoe"), "maxscore").train()
    gate = next(adapters(model))
    hidden = torch.randn(12, 16)
    logits, weights, indices = gate(hidden)
    assert torch.allclose(weights, logits.softmax(-1).gather(1, indices))
    assert torch.bincount(indices.flatten(), minlength=4).tolist() == [6, 6, 6, 6]
    ssr = monge.hf.use_router(tiny("DeepseekV3", routed_scaling_factor=2.5), "ssr", p=1.0).train()
    _, weights, _ = next(adapters(ssr))(hidden)
    assert torch.allclose(weights.sum(1), torch.full((12,), 2.5))  # the plan's gates, scaled as the others
    assert next(adapters(ssr)).router.transport


def test_a_random_seed_does_not_notice():
    model = tiny("Mixtral")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    monge.hf.use_router(model, "prices")
    assert torch.equal(torch.rand(2), expected)


def test_another_router_takes_over_and_restoring_undoes_everything():
    model, untouched = tiny("Qwen3Moe"), tiny("Qwen3Moe")
    ids = tokens()
    monge.hf.use_router(model, "hash")
    monge.hf.use_router(model, "ssr")
    assert {type(m).__name__ for m in model.modules() if isinstance(m, Router)} == {"SSR"}
    monge.hf.restore_router(model)
    assert type(model.model.layers[0].mlp.gate) is type(untouched.model.layers[0].mlp.gate)
    assert torch.equal(model(ids).logits, untouched(ids).logits)
    for one, other in zip(model.modules(), untouched.modules()):
        assert set(one.__dict__) == set(other.__dict__)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
    with pytest.raises(ValueError, match="does not route by monge"):
        monge.hf.restore_router(model)


def test_copies_and_moves_keep_weight_and_prices_together(tmp_path):
    model = monge.hf.use_router(tiny("Mixtral"), "prices")
    train(model)
    ids = tokens()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    gate, copied = next(adapters(model)), next(adapters(twin))
    assert copied.router.weight is copied.weight is not gate.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.save_pretrained(tmp_path / "twin")  # the copy's own, not the first model's
    twin.to(torch.bfloat16)
    assert copied.router.weight is copied.weight
    assert copied.weight.dtype == torch.bfloat16
    assert copied.router.prices.dtype == torch.float32
    assert torch.equal(copied.router.prices, gate.router.prices)
    twin.load_state_dict(model.state_dict(), assign=True)
    assert copied.router.weight is copied.weight
    assert torch.isfinite(twin(ids).logits).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmoe", {}, "there is no router 'softmoe'"),
        ("prices", {"bias": True}, "option 'bias' cannot be chosen"),
        ("prices", {"dtype": torch.float32}, "it follows the model"),
        ("ssr", {"rate": 1}, "has no option 'rate'"),
        ("prices", {"scores": "sigmoid", "gates": "priced"}, "gates='raw'"),
    ],
)
def test_bad_input_changes_nothing(name, options, message):
    model = tiny("Mixtral")
    before = type(model.model.layers[0].mlp.gate)
    with pytest.raises(ValueError, match=message):
        monge.hf.use_router(model, name, **options)
    assert type(model.model.layers[1].mlp.gate) is before


def test_models_that_have_no_place_for_a_router():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    with pytest.raises(ValueError, match=r"no MoE layers.*knows Mixtral.*monge.hf.upcycle"):
        monge.hf.use_router(dense, "prices")
    with pytest.raises(ValueError, match="whose gate use_router does not know"):
        monge.hf.use_router(torch.nn.Sequential(monge.MoE(8, 8, 4, 2)), "prices")


def test_hash_sees_the_tokens_and_not_their_states():
    model = monge.hf.use_router(tiny("Mixtral"), "hash")
    with monge.watch(model) as w:
        model(torch.full((1, 6), 7))
    for routing in w.routings.values():
        assert (routing.indices == routing.indices[0]).all()


def test_compiled_without_graph_breaks_in_the_router():
    model = monge.hf.use_router(tiny("Mixtral"), "prices")
    gate = next(adapters(model))
    hidden = torch.randn(12, 16)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gate(hidden), compiled(hidden)):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.20.3"])
def test_routers_of_an_older_transformers_are_refused(version, monkeypatch):
    """Granite's returned indices first and logits last until 5.21."""
    model = tiny("GraniteMoe")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf"needs transformers 5.21 or newer, not {version}: pip install"):
        monge.hf.use_router(model, "prices")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("version", ["5.21.0", "5.22.0.dev0", "6.0.0"])
def test_routers_of_a_newer_transformers_are_taken(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    monge.hf.use_router(tiny("GraniteMoe"), "prices")
