"""The refit of attention's projection, and the pass after it that computes no attention."""

from __future__ import annotations

import copy

import pytest
import torch

from monge.conversion.attention import attention_projection, refit_attention
from monge.conversion.calibrate import observe, start_streams
from monge.conversion.ffn import find_ffns

FAMILIES = ["llama", "qwen2", "granite", "gpt2", "gemma3"]
N, L, H = 48, 16, 32
HELD_OUT = torch.arange(N * L) % 8 == 7


def disturbed(model):
    """(streams, FFNs, drift (T, H)): one that attention can see and undo, a fixed vector, and noise."""
    ids = torch.randint(0, 300, (N, L), generator=torch.Generator().manual_seed(0))
    ffns = find_ffns(model)
    streams = start_streams(model, ffns, ids)
    drift = 0.3 * torch.randn(N * L, H, generator=torch.Generator().manual_seed(1))
    drift = drift + drift.mean(0) * 50
    streams.converted_NLH = streams.dense_NLH - drift.view(N, L, H)
    return streams, ffns, drift


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_refit_brings_a_disturbed_stream_closer(tiny_model, family):
    model = tiny_model(family)
    streams, ffns, drift = disturbed(model)
    projection = attention_projection(streams, ffns[0])
    names = {module: name for name, module in model.named_modules()}
    assert names[projection].endswith(("o_proj", "c_proj"))
    weight = copy.deepcopy(projection.weight)
    refit, _ = refit_attention(streams, ffns[0], drift, HELD_OUT, alpha=1.0)
    assert refit.error < refit.error_before
    assert not torch.equal(projection.weight, weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "gpt2"])  # Gemma's FFN is not simply added
@torch.no_grad()
def test_the_pass_after_it_equals_one_with_attention_and_computes_none(tiny_model, family):
    model = tiny_model(family)
    streams, ffns, drift = disturbed(model)
    _, replay = refit_attention(streams, ffns[0], drift, HELD_OUT, alpha=1.0)
    assert replay.block is not None
    dense = streams.dense_NLH
    first = next(m for n, m in replay.block.named_modules() if n.endswith(("q_proj", "c_attn")))
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))

    def converted_pass(between):
        streams.dense_NLH = dense
        seen = observe(streams, ffns[0], between)
        return seen, len(calls)

    fresh, with_attention = converted_pass(None)
    replayed, in_all = converted_pass(lambda _: replay.within())
    passes = (N * L + 1023) // 1024
    assert with_attention == in_all - with_attention + passes  # the dense stream's pass is always whole
    for name in ("x_TH", "y_TH", "hidden_TF"):
        assert torch.equal(getattr(replayed, name), getattr(fresh, name)), name
    again, _ = converted_pass(None)  # the block is as it was
    assert torch.equal(again.y_TH, fresh.y_TH)
    assert "forward" not in vars(replay.block)


@torch.no_grad()
def test_attention_that_returns_more_than_its_output_is_computed_anew(tiny_model):
    streams, ffns, drift = disturbed(tiny_model("llama", attn_implementation="eager"))  # its weights too
    _, replay = refit_attention(streams, ffns[0], drift, HELD_OUT, alpha=1.0)
    assert replay.block is None
    with replay.within():
        assert observe(streams, ffns[0]).y_TH.isfinite().all()


@torch.no_grad()
def test_a_forward_put_on_the_module_is_put_back(tiny_model):
    """As accelerate's hooks do."""
    streams, ffns, drift = disturbed(tiny_model("llama"))
    attention = streams.layers[0].self_attn
    own = attention.forward
    attention.forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs)
    _, replay = refit_attention(streams, ffns[0], drift, HELD_OUT, alpha=1.0)
    assert replay.block is attention
    with replay.within():
        assert attention.forward is not wrapped
    assert attention.forward is wrapped
