"""Errors of layers, loads and the oracle against what they are by definition."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from converted_models import convert_by_hand, inputs_of, narrow_by_hand

from monge.conversion.evaluation import active_shares, measure_layers, oracle
from monge.conversion.evaluation.layers import ORACLE_EVERY, oracle_output
from monge.conversion.exporting import export
from monge.conversion.ffn import find_ffns
from monge.conversion.opening import open_any
from monge.conversion.types import FFNWeights

FAMILIES = ["llama", "granite", "gemma2", "phi3", "gpt2", "bert"]


@pytest.fixture(scope="module")
def chunks_NL():
    return torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_has_no_error_and_no_loads(family, tiny_model, chunks_NL):
    model = tiny_model(family)
    layers = measure_layers(model, model, chunks_NL)
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert all(layer.error < 1e-10 and layer.load == [] and layer.oracle is None for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_on_have_no_error(family, tiny_model, tiny_inputs, chunks_NL):
    dense = tiny_model(family)
    shape = {"groups": 6, "active": 6, "shared": 2, "equal_gates": True}
    converted = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense), **shape)
    for layer in measure_layers(dense, converted, chunks_NL, batch=2):
        assert layer.error < 1e-9
        assert layer.load == [48] * 4  # every token on every expert
        assert layer.dead == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_that_of_the_layer_on_the_converted_stream(family, tiny_model, tiny_inputs, chunks_NL):
    dense = tiny_model(family)
    converted = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense))
    layers = measure_layers(dense, converted, chunks_NL)
    for ffn, layer in zip(find_ffns(dense), layers):
        moe = converted.get_submodule(ffn.name)
        x_TH = inputs_of(moe, converted, {"input_ids": chunks_NL})
        y_TH = ffn.read()(x_TH)
        with torch.no_grad():
            wanted = (moe(x_TH) - y_TH).square().sum() / y_TH.square().sum()
        assert layer.error == pytest.approx(float(wanted), rel=1e-4)
        assert layer.error > 1e-3
        assert sum(layer.load) == chunks_NL.numel() * moe.top_k
        assert layer.load == torch.bincount(moe.router(x_TH).indices.flatten(), minlength=6).tolist()
        assert layer.dead == layer.load.count(0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_model_is_compared_too(family, tiny_model, chunks_NL):
    dense = tiny_model(family)
    pruned = narrow_by_hand(copy.deepcopy(dense), 24)
    assert active_shares(pruned, dense) == {0: 0.5, 1: 0.5, 2: 0.5}
    layers = measure_layers(dense, pruned, chunks_NL, shares={1: 0.5})
    assert all(layer.error > 1e-3 for layer in layers)
    assert layers[0].oracle is None
    ffn = find_ffns(dense)[1]
    x_TH = inputs_of(pruned.get_submodule(ffn.name), pruned, {"input_ids": chunks_NL})[::ORACLE_EVERY]
    best_TH, y_TH = oracle_output(ffn.read(), x_TH, 0.5), ffn.read()(x_TH)
    assert layers[1].oracle == pytest.approx(float((best_TH - y_TH).square().sum() / y_TH.square().sum()))
    assert 0 < layers[1].oracle < layers[1].error


@pytest.mark.parametrize("shared", [2, 0])
def test_an_export_has_the_figures_of_the_model_it_was_made_from(
    shared, tmp_path, tiny_model, tiny_inputs, tiny_tokenizer, chunks_NL
):
    dense = tiny_model("llama")
    converted = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense), shared=shared)
    folder = export(converted, tmp_path / "model", tokenizer=tiny_tokenizer)
    standard = open_any(folder).model
    assert type(standard) is not type(dense)
    shares = active_shares(converted, dense)
    assert active_shares(standard, dense) == shares == {0: 0.5, 1: 0.5, 2: 0.5}
    ours = measure_layers(dense, converted, chunks_NL, shares=shares)
    theirs = measure_layers(dense, standard, chunks_NL, shares=shares)
    for a, b in zip(ours, theirs):
        assert b.error == pytest.approx(a.error, rel=1e-3)
        assert b.load == a.load


def test_the_oracle_is_the_best_choice_where_neurons_do_not_overlap():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    scale = torch.rand(6, generator=generator) + 0.5
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = FFNWeights("swiglu", up_FH=draw(6, 8), down_HF=basis[:, :6] * scale, gate_FH=draw(6, 8))
    x_TH = draw(5, 8)
    y_TH, kept_TH = weights(x_TH), oracle_output(weights, x_TH, 0.5)
    subsets = [weights.select(torch.tensor(c))(x_TH) for c in combinations(range(6), 3)]
    best_T = torch.stack([(y_TH - one).norm(dim=1) for one in subsets]).amin(dim=0)
    assert torch.allclose((y_TH - kept_TH).norm(dim=1), best_T, atol=1e-5)
    assert torch.allclose(oracle_output(weights, x_TH, 1.0), y_TH, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_stands_for_the_layers_meanwhile(family, tiny_model, chunks_NL):
    model = tiny_model(family)

    def output():
        with torch.no_grad():
            out = model(input_ids=chunks_NL)
        return out.logits if "logits" in out else out.last_hidden_state

    before = output()
    last = find_ffns(model)[-1]
    with oracle(model, {last.layer: 0.25}):
        x_TH = inputs_of(last.input_module, model, {"input_ids": chunks_NL})
        changed = output()
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(output(), before)
    weights = last.read()
    keep = oracle_output(weights, x_TH, 0.25)
    assert (keep - weights(x_TH)).norm() > 1e-2
    with oracle(model, {0: 1.0}):
        assert torch.equal(output(), before)


def test_bad_input_is_named(tiny_model, chunks_NL):
    dense = tiny_model("llama")
    with pytest.raises(ValueError, match="0: 0"), oracle(dense, {0: 0.0}):
        pass
    with pytest.raises(ValueError, match=r"nothing in the place of model.layers.2.mlp"):
        measure_layers(dense, tiny_model("llama", num_hidden_layers=2), chunks_NL)
