"""The scale of the final norm, for every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monge.conversion.teacher import Head
from monge.conversion.temperature import GRID, final_norm, fit_scale, scale_final_norm

CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3", "gpt2", "phi3"]


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_the_final_hidden_states_are_scaled(tiny_model, family):
    model = tiny_model(family)
    ids = torch.arange(24).view(2, 12)
    before = model.base_model(ids).last_hidden_state
    assert scale_final_norm(model, 0.8)
    torch.testing.assert_close(model.base_model(ids).last_hidden_state, 0.8 * before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_norm_that_is_no_plain_scale_is_left_alone(tiny_model):
    model = tiny_model("llama")
    norm = final_norm(model)
    model.model.norm = type("Odd", (torch.nn.Module,), {"forward": lambda self, x: x * self.weight**2})()
    model.model.norm.weight = norm.weight
    before = norm.weight.clone()
    assert not scale_final_norm(model, 0.8)
    assert torch.equal(norm.weight, before)


@torch.no_grad()
def test_the_scale_undoes_a_wrong_temperature(tiny_model):
    model = tiny_model("llama")
    ids = torch.arange(64).view(4, 16)
    states = model.base_model(ids).last_hidden_state.flatten(0, 1)
    head = Head.of(model, ids[:1])
    assert fit_scale(states, states / 0.8, head) == pytest.approx(0.8)
    assert fit_scale(states, states, head) == pytest.approx(1.0)
    capped = replace(head, softcap=2.0)  # whose logits do not grow in proportion to the states
    assert fit_scale(states, states / 0.8, capped) == pytest.approx(0.8)
    noisy = states + 0.5 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    assert GRID[0] <= fit_scale(states, noisy, head) < 1
