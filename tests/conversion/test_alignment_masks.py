"""Masks on a model: what they compute, that they come off, and that the exported layer computes the same."""

from __future__ import annotations

import pytest
import torch
from alignment_cases import planted, tiny_gpt2, tiny_llama, token_chunks

from monge.conversion.alignment import NeuronMask, masked
from monge.conversion.alignment.masks import lifted, output_projection
from monge.conversion.alignment.start import neuron_energies
from monge.conversion.building import make_moe
from monge.conversion.ffn import find_ffns
from monge.conversion.types import DROPPED, SHARED, ExpertShape, Partition

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def masks_for(ffns, N, top_k, *, shared=0, dropped=0) -> list[NeuronMask]:
    masks = []
    for seed, ffn in enumerate(ffns):
        generator = torch.Generator().manual_seed(seed)
        weights = ffn.read()
        labels_F = torch.arange(weights.neurons) % N
        labels_F[:shared] = SHARED
        labels_F[shared : shared + dropped] = DROPPED
        labels_F = labels_F[torch.randperm(len(labels_F), generator=generator)]
        router_NH = torch.randn(N, weights.up_FH.shape[1], generator=generator)
        masks.append(NeuronMask(Partition(labels_F, router_NH), top_k))
    return masks


@torch.no_grad()
def logits(model):
    return model(input_ids=token_chunks()[0]).logits


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_with_all_experts_on_everything_is_dense_to_the_bit(make):
    model = make()
    ffns, dense = find_ffns(model), logits(model)
    with masked(ffns, masks_for(ffns, 4, 4, shared=3)):
        assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_masked_ffn_sums_the_chosen_experts(make):
    model = make()
    ffn = find_ffns(model)[1]
    (mask,) = masks_for([ffn], 4, 2, shared=5, dropped=3)
    weights, x_TH = ffn.read(), torch.randn(9, 16)
    with masked([ffn], [mask]), torch.no_grad():
        y_TH = ffn.input_module(x_TH.view(3, 3, 16)).reshape(9, 16)
    for t in range(9):
        chosen = (mask.router_NH @ x_TH[t]).topk(2).indices.tolist()
        on = torch.tensor([label == SHARED or label in chosen for label in mask.labels_F.tolist()])
        alone = weights.select(on.nonzero()[:, 0])
        assert torch.allclose(y_TH[t], alone(x_TH[t : t + 1])[0], atol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_model_is_dense_before_after_lifted_and_when_something_fails(make):
    model = make()
    ffns, dense = find_ffns(model), logits(model)
    masks = masks_for(ffns, 4, 1)
    with masked(ffns, masks):
        sparse = logits(model)
        assert not torch.allclose(sparse, dense, atol=1e-2)
        with lifted(masks):
            assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), sparse)
    assert torch.equal(logits(model), dense)
    with pytest.raises(RuntimeError), masked(ffns, masks):
        raise RuntimeError
    assert torch.equal(logits(model), dense)
    with pytest.raises(ValueError, match="zip"), masked(ffns, masks[:1]):
        pass
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_masked_model_is_the_moe_that_is_built_of_it(make):
    model = make()
    ffns = find_ffns(model)
    F = ffns[0].read().neurons
    shape = ExpertShape(F, 8, 5, 2)
    masks = masks_for(ffns, shape.routed, shape.top_k, shared=shape.shared_neurons)
    with masked(ffns, masks):
        sparse = logits(model)
    for ffn, mask in zip(ffns, masks):
        partition = mask.partition()
        ffn.install(make_moe(ffn.read(), partition, shape, partition.router_NH, gates="binary"))
    assert torch.allclose(logits(model), sparse, atol=1e-4)


def test_without_routed_neurons_every_token_has_the_same_mask():
    labels_F = torch.tensor([SHARED, DROPPED, SHARED, DROPPED])
    mask = NeuronMask(Partition(labels_F), 1, torch.randn(4, 3))
    assert mask(torch.randn(5, 8)).tolist() == [[1, 0, 1, 0]] * 5
    assert not list(mask.parameters())


def test_routed_neurons_need_a_router():
    with pytest.raises(ValueError, match="router_NH"):
        NeuronMask(Partition(torch.tensor([0, 1])), 1)


def test_the_output_projection_is_found_by_its_values():
    for model in (tiny_llama(neurons=16), tiny_gpt2()):  # 16 = the width: shapes tell nothing
        name = "down_proj" if hasattr(model, "model") else "c_proj"
        for ffn in find_ffns(model):
            assert output_projection(ffn) is getattr(ffn.input_module, name)


def test_energies_of_neurons_are_those_of_the_formula():
    model, _, _ = planted()
    (ffn,) = find_ffns(model)
    weights, inputs = ffn.read(), []
    chunks = token_chunks(2)
    handle = ffn.input_module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    (energy_F,) = neuron_energies(model, [ffn], chunks)
    handle.remove()
    h_TF = weights.hidden(torch.cat(inputs).flatten(0, 1))
    expected = h_TF.double().square().mean(0) * weights.down_HF.double().square().sum(0)
    assert torch.allclose(energy_F, expected)
