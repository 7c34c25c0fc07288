"""The two residual streams against whole forwards of the dense and the half-converted model."""

from __future__ import annotations

import copy

import pytest
import torch

from monge.conversion.calibrate import advance, observe, skip, start_streams
from monge.conversion.ffn import find_ffns

AFFINE = ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gpt2"]
RUN_AGAIN = ["gemma2", "gemma3", "bert"]


def chunks_for(model):
    generator = torch.Generator().manual_seed(0)
    if hasattr(model.config, "image_size"):
        return torch.randn(5, 3, 16, 16, generator=generator)
    return torch.randint(0, model.config.vocab_size, (5, 12), generator=generator)


def hidden_after(model, layers, layer, chunks):
    """The output of a layer in a whole forward of the model."""
    found = []
    handle = layers[layer].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    model(chunks)
    handle.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("family", [*AFFINE, *RUN_AGAIN, "vit"])
def test_both_streams_are_those_of_whole_forwards(tiny_model, family):
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    chunks, ffns = chunks_for(model), find_ffns(model)
    streams = start_streams(model, ffns, chunks)
    for ffn in ffns:
        weights = ffn.read()
        if ffn.layer == 1:
            skip(streams, ffn)
        else:
            seen = observe(streams, ffn)
            torch.testing.assert_close(seen.y_TH, weights(seen.x_TH), rtol=1e-4, atol=1e-5)
            half = copy.deepcopy(weights)
            half.down_HF[:, ::2] = 0  # what the "conversion" of this test does

            class Half(torch.nn.Module):
                def __init__(self, weights):
                    super().__init__()
                    self.weights = weights

                def forward(self, x):
                    return self.weights(x)

            ffn.install(Half(half))
            advance(streams, ffn, seen, half(seen.x_TH))
        wanted = hidden_after(model, streams.layers, ffn.layer, chunks)
        torch.testing.assert_close(streams.converted_NLH, wanted, rtol=1e-4, atol=1e-4)
        layers = find_layers(dense)
        wanted = hidden_after(dense, layers, ffn.layer, chunks)
        torch.testing.assert_close(streams.dense_NLH, wanted, rtol=1e-4, atol=1e-4)
        assert streams.layer == ffn.layer + 1


def find_layers(model):
    from monge.conversion.ffn import layers_of

    return layers_of(model, find_ffns(model))


@torch.no_grad()
@pytest.mark.parametrize("family", AFFINE)
def test_adding_the_drift_to_the_dense_output_gives_the_dense_stream(tiny_model, family):
    """y_dense(x_dense) + what is missing: the residual's drift is exact in layers that add their FFN."""
    model = tiny_model(family)
    ffns, chunks = find_ffns(model), chunks_for(model)
    streams = start_streams(model, ffns, chunks)
    generator = torch.Generator().manual_seed(1)
    streams.converted_NLH = streams.dense_NLH + 0.1 * torch.randn(
        streams.dense_NLH.shape, generator=generator
    )
    ffn = ffns[0]
    before_NLH = streams.dense_NLH.clone()
    seen = observe(streams, ffn)
    assert seen.factor == pytest.approx(getattr(model.config, "residual_multiplier", 1.0), rel=1e-3)
    again = start_streams(model, ffns, chunks)
    again.dense_NLH = again.converted_NLH = before_NLH
    dense_y_TH = observe(again, ffn).y_TH
    # r_c + m (y_dense + drift) = the dense stream
    total = seen.residual_NLH + seen.factor * (dense_y_TH + seen.drift_TH).view_as(seen.residual_NLH)
    torch.testing.assert_close(total, streams.dense_NLH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", RUN_AGAIN)
@torch.no_grad()
def test_layers_that_normalise_their_ffn_are_noticed(tiny_model, family):
    model = tiny_model(family)
    ffns = find_ffns(model)
    seen = observe(start_streams(model, ffns, chunks_for(model)), ffns[0])
    assert seen.factor is None
    assert seen.residual_NLH is None
    assert (seen.drift_TH is None) == (family != "bert")


@torch.no_grad()
def test_nan_activations_are_refused_with_the_layer(tiny_model):
    model = tiny_model("llama")
    ffns = find_ffns(model)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    streams = start_streams(model, ffns, chunks_for(model))
    skip(streams, ffns[0])
    with pytest.raises(ValueError, match=r"layer 1 .*NaN or infinite"):
        observe(streams, ffns[1])
