"""Perplexity, KL, agreement against a naive computation; the shift of top_k against formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from converted_models import convert_by_hand
from torch.nn import functional as nnf

from monge.conversion.evaluation import compare_models, find_blocks, perplexity, shifted_top_k
from monge.conversion.evaluation.quality import POSITIONS_AT_ONCE, Sums, predictor, sum_predictors
from monge.hf.blocks import layer_in, possible_offsets


@pytest.fixture(scope="module")
def pair(tiny_model, tiny_inputs):
    dense = tiny_model("llama")
    return dense, convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense))


@pytest.fixture(scope="module")
def chunks_NL():
    return torch.randint(0, 300, (5, 70), generator=torch.Generator().manual_seed(1))


def naive(dense, converted, chunks_NL):
    """All logits at once, in float64."""
    with torch.no_grad():
        p, q = (
            m(input_ids=chunks_NL).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)
            for m in (dense, converted)
        )
    targets = chunks_NL[:, 1:].flatten()
    return {
        "perplexity": math.exp(nnf.nll_loss(q, targets)),
        "perplexity_dense": math.exp(nnf.nll_loss(p, targets)),
        "kl": float(nnf.kl_div(q, p, log_target=True, reduction="batchmean")),
        "agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "tokens": len(targets),
    }


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_figures_are_those_of_the_naive_computation(pair, chunks_NL, batch):
    assert batch * 69 % POSITIONS_AT_ONCE  # a part of the positions is left over
    quality = compare_models(*pair, chunks_NL, batch=batch)
    wanted = naive(*pair, chunks_NL)
    assert quality.kl > 1e-3
    assert 0 < quality.agreement < 1
    for name, value in wanted.items():
        assert getattr(quality, name) == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_perplexity_of_one_model_is_the_one_of_the_comparison(pair, chunks_NL):
    quality = compare_models(*pair, chunks_NL, batch=2)
    assert perplexity(pair[0], chunks_NL, batch=2) == quality.perplexity_dense
    assert perplexity(pair[1], chunks_NL, batch=2) == quality.perplexity


def test_a_model_and_itself_are_one(pair, chunks_NL):
    quality = compare_models(pair[1], pair[1], chunks_NL)
    assert (quality.kl, quality.agreement) == (0.0, 1.0)
    assert quality.perplexity == quality.perplexity_dense


def test_the_divergence_is_that_of_the_converted_from_the_dense(pair, chunks_NL):
    forth, back = compare_models(*pair, chunks_NL), compare_models(*pair[::-1], chunks_NL)
    assert forth.kl != pytest.approx(back.kl, rel=1e-3)


def test_sums_of_parts_are_the_sums_of_the_whole(pair, chunks_NL):
    dense, converted = pair
    parts = [sum_predictors(dense, [predictor(converted)], part)[0] for part in chunks_NL.split(2)]
    whole = sum_predictors(dense, [predictor(converted)], chunks_NL)[0]
    total = sum(parts, Sums())
    assert (total.tokens, total.agreed) == (whole.tokens, whole.agreed)
    assert total.nll == pytest.approx(whole.nll, rel=1e-12)


def test_one_expert_more_than_all_but_one_is_the_dense_model(tiny_model, tiny_inputs, chunks_NL):
    dense = tiny_model("llama")
    shape = {"groups": 6, "active": 5, "shared": 2, "equal_gates": True}
    converted = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense), **shape)
    for block in find_blocks(converted):  # others round otherwise, which the float32 KL tells as up to 1e-8
        block.experts.compute = "sorted"
    assert compare_models(dense, converted, chunks_NL).kl > 1e-3
    assert compare_models(dense, converted, chunks_NL, k_offset=1).kl < 1e-9


@pytest.mark.parametrize("offset", [-1, 0, 1, 2])
@pytest.mark.parametrize("normalises", [True, False])
def test_a_shifted_block_of_transformers_follows_the_formula(offset, normalises):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=8,
        moe_intermediate_size=4,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=normalises,
    )
    model = torch.nn.ModuleDict({"mlp": Qwen3MoeSparseMoeBlock(config)})
    block = model["mlp"]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 7, 8)
    with torch.no_grad(), shifted_top_k(model, offset):
        y = block(x)[0]
    gates = (x[0] @ block.gate.weight.T).softmax(-1)
    wanted = torch.zeros(7, 8)
    for t in range(7):
        chosen = gates[t].topk(2 + offset).indices
        scale = (2 + offset) / 2 / gates[t, chosen].sum() if normalises else 1
        for e in chosen:
            gate, up = (block.experts.gate_up_proj[e] @ x[0, t]).chunk(2)
            wanted[t] += scale * gates[t, e] * (block.experts.down_proj[e] @ (nnf.silu(gate) * up))
    assert torch.allclose(y, wanted, atol=1e-4)
    assert block.gate.top_k == 2


def test_top_k_and_gates_are_restored_after_an_error(pair, chunks_NL):
    converted = pair[1]
    before = predictor(converted)(chunks_NL)
    with pytest.raises(RuntimeError, match="inside"), shifted_top_k(converted, 1):
        raise RuntimeError("inside")
    assert torch.equal(predictor(converted)(chunks_NL), before)


def test_offsets_that_a_model_allows(pair):
    dense, converted = pair
    assert possible_offsets(dense, (0, -1, 1)) == (0,)
    assert possible_offsets(converted, (0, -1, 1)) == (0, -1, 1)
    block = find_blocks(converted)[0]
    assert possible_offsets(converted, (block.num_experts - block.top_k + 1, -block.top_k)) == ()


def test_layers_are_found_with_their_numbers(pair):
    blocks = find_blocks(pair[1])
    assert [block.layer for block in blocks] == [0, 1, 2]
    assert [(b.top_k, b.num_experts) for b in blocks] == [(2, 6)] * 3
    assert find_blocks(pair[0]) == []
    assert layer_in("encoder.layer.11.mlp.experts.3") == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: ids.float(), "float32"),
        (lambda ids: ids[0], r"\(70,\)"),
        (lambda ids: ids[:, :1], r"\(5, 1\)"),
        (lambda ids: ids[:0], r"\(0, 70\)"),
        (lambda ids: ids + 300, "vocabulary of 320"),
        (lambda ids: ids - 300, "vocabulary of 320"),
    ],
)
def test_chunks_that_are_no_tokens_are_refused(pair, chunks_NL, change, said):
    with pytest.raises(ValueError, match=said):
        compare_models(*pair, change(chunks_NL))
    with pytest.raises(ValueError, match=said):
        perplexity(pair[0], change(chunks_NL))


def test_models_that_do_not_belong_together_are_refused(pair, chunks_NL, tiny_model):
    with pytest.raises(ValueError, match="one vocabulary, got 320 and 400"):
        compare_models(pair[0], tiny_model("llama", vocab_size=400), chunks_NL)
    with pytest.raises(ValueError, match="no mixture layers"):
        compare_models(*pair[::-1], chunks_NL, k_offset=1)
    with pytest.raises(ValueError, match="offset=9 is out of range"):
        compare_models(*pair, chunks_NL, k_offset=9)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        compare_models(*pair, chunks_NL, batch=0)


def test_damaged_weights_are_named(pair, chunks_NL):
    damaged = copy.deepcopy(pair[0])
    damaged.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN logits"):
        compare_models(pair[0], damaged, chunks_NL)
