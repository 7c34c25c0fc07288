"""Neuron importance against the model's own autograd, finite differences, and bad models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

from monge.conversion.ffn import find_ffns
from monge.conversion.importance import neuron_importance
from monge.conversion.partition.balanced_kmeans import cluster_balanced

DOWN = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "gemma": "mlp.down_proj", "phi3": "mlp.down_proj"}


def loss_of(model: nn.Module, ids_BL: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids_BL).logits[:, :-1]
    return nnf.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum")


def layers(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def brute_force(model: nn.Module, family: str, ids_BL: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """(x, |h dl/dh|) per layer, token by token: h is caught at the input of the down projection."""
    caught: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def catch(module, args):
        args[0].retain_grad()
        caught.append(args[0])

    hooks = []
    for layer in layers(model):
        hooks.append(layer.get_submodule(DOWN[family]).register_forward_pre_hook(catch))
        hooks.append(layer.mlp.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach())))
    loss_of(model, ids_BL).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return [(x.flatten(0, 1), (h * h.grad).detach().abs().flatten(0, 1)) for x, h in zip(inputs, caught)]


@pytest.mark.parametrize("family", DOWN)
def test_equal_to_autograd_through_the_model(family, tiny_model, tiny_inputs):
    model = tiny_model(family)
    # 40 x 32 tokens are three batches.
    ids = tiny_inputs(model, sequences=40, length=32)["input_ids"]
    found = neuron_importance(model, find_ffns(model), ids, clusters=1)
    expected = brute_force(model, family, ids)
    assert len(found) == len(expected) == 3
    for importance_CF, (_, effect_TF) in zip(found, expected):
        assert importance_CF.shape == (1, 48)
        assert importance_CF.dtype == torch.float32
        torch.testing.assert_close(importance_CF[0], effect_TF.mean(0), rtol=2e-4, atol=1e-7)


def test_every_token_counts_in_the_nearest_cluster(tiny_model, tiny_inputs):
    model = tiny_model("llama")
    ids = tiny_inputs(model, sequences=40, length=32)["input_ids"]
    found = neuron_importance(model, find_ffns(model), ids, clusters=4, seed=5)
    for importance_CF, (x_TH, effect_TF) in zip(found, brute_force(model, "llama", ids)):
        _, centroids = cluster_balanced(x_TH, 4, seed=5)
        nearest_T = torch.cdist(x_TH.double(), centroids.double()).argmin(1)
        for cluster in range(4):
            expected_F = effect_TF[nearest_T == cluster].mean(0)
            torch.testing.assert_close(importance_CF[cluster], expected_F, rtol=5e-3, atol=1e-6)
        assert not torch.allclose(importance_CF[0], importance_CF[1], rtol=0.05)


def test_equal_to_finite_differences(tiny_model, tiny_inputs):
    """Scale one neuron at one token by 1 +- eps: the slope of the loss is h dl/dh."""
    model = tiny_model("llama")
    ids = tiny_inputs(model, sequences=1, length=6)["input_ids"]
    found = neuron_importance(model, find_ffns(model), ids, clusters=1)
    model = model.double()

    def slope(layer, neuron, token, eps=0.02):  # the norms compute in float32 whatever the model
        def scaled(factor):
            def hook(module, args):
                h = args[0].clone()
                h[0, token, neuron] *= factor
                return (h,)

            handle = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(hook)
            with torch.no_grad():
                loss = loss_of(model, ids)
            handle.remove()
            return float(loss)

        return (scaled(1 + eps) - scaled(1 - eps)) / (2 * eps)

    for layer, importance_CF in enumerate(found):
        neuron = int(importance_CF[0].argmax())
        expected = sum(abs(slope(layer, neuron, token)) for token in range(6)) / 6
        assert float(importance_CF[0, neuron]) == pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_as_it_was_and_the_answer_is_repeatable(tiny_model, tiny_inputs):
    model = tiny_model("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    ids = tiny_inputs(model)["input_ids"]
    first = neuron_importance(model, find_ffns(model)[1:], ids, clusters=3, seed=2)
    again = neuron_importance(model, find_ffns(model)[1:], ids, clusters=3, seed=2)
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert modes == [module.training for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_refused_and_leaves_no_hooks(tiny_model, tiny_inputs):
    llama = tiny_model("llama")
    ids = tiny_inputs(llama)["input_ids"]
    with pytest.raises(ValueError, match=r"clusters must be in 1\.\.32"):
        neuron_importance(llama, find_ffns(llama), ids, clusters=33)
    with pytest.raises(ValueError, match="length of at least 2"):
        neuron_importance(llama, find_ffns(llama), ids[:, :1], clusters=1)
    bert = tiny_model("bert")
    with pytest.raises(ValueError, match="needs a causal language model; BertModel"):
        neuron_importance(bert, find_ffns(bert), ids, clusters=2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bert.modules())
    ffns = find_ffns(llama)
    with torch.no_grad():
        llama.lm_head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="loss of LlamaForCausalLM is nan"):
        neuron_importance(llama, ffns, ids, clusters=2)
