"""Parameters and FLOPs counted by hand, and by torch's own counter."""

from __future__ import annotations

import copy

import pytest
import torch
from converted_models import convert_by_hand, narrow_by_hand
from torch.utils.flop_counter import FlopCounterMode

from monge.conversion.evaluation import measure_cost, measure_speed, peak_memory_bytes
from monge.conversion.exporting import export
from monge.conversion.opening import open_any

H, F, L, V, KV = 32, 48, 3, 320, 16
ATTENTION = 2 * H * H + 2 * H * KV
NORMS = H * (2 * L + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_llama(tied, tiny_model):
    model = tiny_model("llama", tie_word_embeddings=tied)
    cost = measure_cost(model, model, context=10)
    matrices = L * (ATTENTION + 3 * H * F) + V * H
    assert cost.params_total == cost.params_active == matrices + NORMS + (0 if tied else V * H)
    assert cost.ffn_active == 1
    assert cost.flops == 2 * matrices + 10 * 4 * L * H


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("active", "shared"), [(4, 2), (2, 0), (1, 0), (8, 3)])
def test_a_converted_llama(tied, active, shared, tiny_model, tiny_inputs):
    dense = tiny_model("llama", tie_word_embeddings=tied)
    model = copy.deepcopy(dense)
    convert_by_hand(model, tiny_inputs(dense), groups=8, active=active, shared=shared)
    before, cost = measure_cost(dense, dense), measure_cost(model, dense)
    routers = L * (8 - shared) * H
    assert cost.params_total == before.params_total + routers
    assert cost.params_active == before.params_active + routers - L * 3 * H * F * (8 - active) // 8
    assert cost.ffn_active == active / 8
    assert before.flops - cost.flops == 2 * (before.params_active - cost.params_active)


def test_some_layers_converted_and_a_pruned_model(tiny_model, tiny_inputs):
    dense = tiny_model("llama")
    some = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense), layers=[1])
    assert measure_cost(some, dense).ffn_active == pytest.approx((1 + 0.5 + 1) / 3)
    pruned = narrow_by_hand(copy.deepcopy(dense), 12)
    cost = measure_cost(pruned, dense)
    assert cost.ffn_active == 0.25
    assert cost.params_active == cost.params_total


def test_biases_are_parameters_but_no_products(tiny_model, tiny_inputs):
    dense = tiny_model("gpt2")
    model = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense), groups=8, active=4, shared=2)
    before, cost = measure_cost(dense, dense, context=0), measure_cost(model, dense, context=0)
    assert cost.ffn_active == 0.5
    assert before.flops - cost.flops == 2 * L * (2 * H * F // 2 - 6 * H)
    assert before.params_active - cost.params_active == L * (2 * H * F // 2 + F // 2 - 6 * H)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_dense_model_takes_the_operations_that_torch_counts(family, tiny_model):
    model = tiny_model(family, attn_implementation="eager")  # of which torch counts every product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    assert counter.get_total_flops() == measure_cost(model, model, context=1).flops


def test_an_export_costs_what_its_model_costs(tmp_path, tiny_model, tiny_inputs, tiny_tokenizer):
    dense = tiny_model("llama")
    model = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense))
    standard = open_any(export(model, tmp_path / "model", tokenizer=tiny_tokenizer)).model
    ours, theirs = measure_cost(model, dense), measure_cost(standard, dense)
    assert theirs.ffn_active == ours.ffn_active == 0.5
    padding = 8 - 6  # the export's experts have a multiple of 8 neurons
    assert theirs.params_total - ours.params_total == L * 6 * padding * 3 * H
    assert theirs.params_active - ours.params_active == L * 2 * padding * 3 * H
    assert theirs.flops - ours.flops == 2 * L * 2 * padding * 3 * H


def test_speed_is_of_every_model_in_turn(tiny_model):
    model, seen = tiny_model("llama"), []

    class Turns:
        def advance(self, steps=1, note=""):
            seen.append(steps)

    speeds = measure_speed(
        {"a": model, "b": model},
        torch.arange(40),
        decode=2,
        turns=2,
        observer=Turns(),  # type: ignore[arg-type]
    )
    assert set(speeds) == {"a", "b"}
    assert len(seen) == 2 * 3
    assert all(s.prefill_tokens_per_s > 0 and s.decode_tokens_per_s > 0 for s in speeds.values())
    assert peak_memory_bytes() > 10 * 2**20


@pytest.mark.parametrize(
    "change", [{"decode": 0}, {"turns": 0}, {"prompt_L": torch.zeros(0, dtype=torch.int64)}]
)
def test_bad_input_is_named(change, tiny_model):
    arguments = {"prompt_L": torch.arange(4), "decode": 1, "turns": 1, **change}
    with pytest.raises(ValueError, match="at least 1"):
        measure_speed({"a": tiny_model("llama")}, **arguments)
    with pytest.raises(ValueError, match="context"):
        measure_cost(tiny_model("llama"), tiny_model("llama"), context=-1)
