"""FFNs are found by structure in every family, and what is read, replaced and narrowed is the FFN."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

from monge.conversion.ffn import find_ffns, layers_of
from monge.conversion.layouts import activation_name

ACTIVATION = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "granite", "phi3"], "swiglu"),
    **dict.fromkeys(["gemma", "gemma2", "gemma3"], "geglu"),
    **dict.fromkeys(["bert", "vit"], "gelu"),
    "gpt2": "gelu_tanh",
}
every_family = pytest.mark.parametrize("family", list(ACTIVATION))


def watched(model, ffn, inputs):
    """x and y of an FFN in a forward of the model, by hooks on the modules that it names."""
    seen = {}
    hooks = [
        ffn.input_module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        ffn.output_module.register_forward_hook(lambda _, __, out: seen.update(y=out)),
    ]
    out = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    return seen["x"], seen["y"], out


class Apply(nn.Module):
    """A replacement for an FFN."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@every_family
@torch.no_grad()
def test_the_weights_read_are_those_of_the_model(family, tiny_model, tiny_inputs):
    model = tiny_model(family)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    assert len(layers_of(model, ffns)) == 3
    for ffn in ffns:
        weights = ffn.read()
        assert (weights.activation, weights.neurons) == (ACTIVATION[family], 48)
        assert (weights.gate_FH is not None) == (family not in ("bert", "vit", "gpt2"))
        x, y, _ = watched(model, ffn, tiny_inputs(model))
        torch.testing.assert_close(weights(x), y, rtol=1e-4, atol=1e-5)


@every_family
@torch.no_grad()
def test_a_replacement_takes_the_place_and_the_hooks_follow(family, tiny_model, tiny_inputs):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    ffns = find_ffns(model)
    before = model(**inputs)[0]
    weights = [ffn.read() for ffn in ffns]
    for ffn, dense in zip(ffns, weights):
        ffn.install(Apply(dense))
    torch.testing.assert_close(model(**inputs)[0], before, rtol=1e-4, atol=1e-4)

    ffns[1].install(Apply(lambda x: 2 * weights[1](x) + 1))
    x, y, after = watched(model, ffns[1], inputs)
    torch.testing.assert_close(y, 2 * weights[1](x) + 1)
    assert not torch.allclose(after, before, atol=1e-2)
    with pytest.raises(ValueError, match="no longer holds a dense FFN"):
        ffns[1].read()


@every_family
@torch.no_grad()
def test_a_narrow_ffn_has_the_chosen_neurons(family, tiny_model, tiny_inputs):
    model = tiny_model(family)
    ffn = find_ffns(model)[1]
    dense = ffn.read()
    kept = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:20]
    ffn.narrow(dense.select(kept))
    x, y, _ = watched(model, ffn, tiny_inputs(model))
    torch.testing.assert_close(y, dense.select(kept)(x), rtol=1e-4, atol=1e-5)
    assert find_ffns(model)[1].read().neurons == 20
    ffn.narrow(dense)
    _, y, _ = watched(model, ffn, tiny_inputs(model))
    torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-5)


def test_biases_of_gated_ffns_are_read_and_narrowed(tiny_model):
    ffn = find_ffns(tiny_model("llama", mlp_bias=True))[0]
    dense = ffn.read()
    assert dense.gate_bias_F.abs().sum() > 0
    assert dense.down_bias_H.abs().sum() > 0
    ffn.narrow(dense.select(torch.arange(7)))
    assert torch.equal(ffn.read().gate_bias_F, dense.gate_bias_F[:7])


def test_a_bias_without_a_place_is_refused(tiny_model):
    ffn = find_ffns(tiny_model("llama"))[0]
    biased = find_ffns(tiny_model("llama", mlp_bias=True))[0].read()
    with pytest.raises(ValueError, match="has no bias and is given one"):
        ffn.narrow(biased)


@torch.no_grad()
def test_equal_widths_and_odd_names_and_orders_do_not_matter():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.f = nnf.silu

        def forward(self, x):  # down a, gate c, up b; F equals H
            return self.a(self.f(self.c(x)) * self.b(x))

    model = nn.Module()
    model.blocks = nn.ModuleList([Odd(), Odd()])
    for ffn, block in zip(find_ffns(model), model.blocks):
        weights = ffn.read()
        assert torch.equal(weights.gate_FH, block.c.weight)
        assert torch.equal(weights.up_FH, block.b.weight)
        assert torch.equal(weights.down_HF, block.a.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_read_in_float32(dtype, tiny_model):
    ffn = find_ffns(tiny_model("gpt2").to(dtype))[0]
    assert ffn.activation == "gelu_tanh"
    assert ffn.read().up_FH.dtype == torch.float32


def test_training_mode_is_left_as_it_was_and_passed_on(tiny_model):
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    ffns = find_ffns(model)
    assert model.training
    assert model.transformer.h[0].mlp.training
    assert not model.transformer.h[1].mlp.training
    for ffn in ffns:
        ffn.install(nn.Identity())
    assert [ffn.input_module.training for ffn in ffns] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "gated", "expected"),
    [
        ("silu", True, "swiglu"), ("swish", True, "swiglu"), ("gelu_pytorch_tanh", True, "geglu"),
        ("gelu_new", False, "gelu_tanh"), ("gelu_fast", False, "gelu_tanh"), ("gelu", False, "gelu"),
        ("gelu_python", False, "gelu"), ("gelu", True, "geglu_exact"), ("relu", False, "relu"),
        ("quick_gelu", True, None), ("relu2", False, None), ("mish", True, None), ("silu", False, None),
    ],
)  # fmt: skip
def test_activations_are_known_by_what_they_do(name, gated, expected):
    from transformers.activations import ACT2FN

    assert activation_name(ACT2FN[name], gated=gated) == expected


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_an_unknown_activation_is_named(family, tiny_model):
    field = "activation_function" if family == "gpt2" else "hidden_act"
    with pytest.raises(ValueError, match="QuickGELUActivation") as error:
        find_ffns(tiny_model(family, **{field: "quick_gelu"}))
    assert "is not supported. Looked for" in str(error.value)


def test_an_ffn_that_does_something_else_is_refused(tiny_model):
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x).clamp(-0.1, 0.1)
    with pytest.raises(ValueError, match=r"0 in layer 1 of 3.*not that of a swiglu FFN"):
        find_ffns(model)


@pytest.mark.parametrize(
    ("config", "model", "options"),
    [
        ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 2}),
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 8}),
    ],
)
def test_a_mixture_of_experts_is_refused(config, model, options):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, config)(**sizes, **heads, **options)
    with pytest.raises(ValueError, match="is a Mixture of Experts already"):
        find_ffns(getattr(transformers, model)(config))


def test_a_converted_model_is_refused(tiny_model):
    from monge import MoE

    model = tiny_model("llama")
    for ffn in find_ffns(model):
        ffn.install(MoE(32, 8, 4, 2))
    with pytest.raises(
        ValueError, match=r"is a Mixture of Experts already \(model\.layers\.0\.mlp.* 4 experts"
    ):
        find_ffns(model)


def test_unsupported_architectures_say_what_was_found():
    from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

    opt = OPTConfig(
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        word_embed_proj_dim=16,
    )
    with pytest.raises(ValueError, match=r"Found no FFN, but the linear maps .*layers\.0\.fc1 \(32, 16\)"):
        find_ffns(OPTForCausalLM(opt))
    t5 = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(ValueError, match=r"Found FFNs in encoder\.block, decoder\.block"):
        find_ffns(T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match="no linear maps in a ModuleList"):
        find_ffns(nn.Linear(4, 4))
