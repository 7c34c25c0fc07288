"""Upcycling: the mixture computes what the dense model does, in every precision, and trains apart."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_models import VOCAB, tokens, train

import monge
from monge.auditing import audit

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 4}
CASES = {
    "llama": ("Llama", {}, "Mixtral"),
    "llama-more": (
        "Llama",
        {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-3,
         "hidden_act": "gelu_pytorch_tanh"},
        "Mixtral",
    ),
    "mistral": ("Mistral", {"sliding_window": 4}, "Mixtral"),
    "qwen2": ("Qwen2", {}, "Qwen2Moe"),
    "qwen2-windows": ("Qwen2", {**WINDOWS, "max_window_layers": 1}, "Qwen2Moe"),
    "qwen3": ("Qwen3", {"head_dim": 8}, "Qwen3Moe"),
    "qwen3-windows": ("Qwen3", {**WINDOWS, "max_window_layers": 0, "attention_bias": True}, "Qwen3Moe"),
}  # fmt: skip


def dense_model(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_same_function(case, top_k):
    family, changes, target = CASES[case]
    dense = dense_model(family, **changes)
    sparse = monge.hf.upcycle(dense, 4, top_k)
    assert type(sparse).__name__ == f"{target}ForCausalLM"
    ids = tokens(length=24)
    assert torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)
    dense, sparse = dense.double(), None
    sparse = monge.hf.upcycle(dense, 4, top_k)
    sparse.set_experts_implementation("eager")  # the only one for float64
    found, expected = sparse(ids).logits, dense(ids).logits
    assert found.dtype == torch.float64
    # stock routers compute their gates in float32, so a token's gates sum to one within 1e-7
    assert torch.allclose(found, expected, atol=1e-12 if top_k == 1 else 5e-6, rtol=0)
    ours = monge.hf.use_router(sparse, "topk")(ids).logits  # ours are float64 then
    assert torch.allclose(ours, expected, atol=1e-11, rtol=0)


def test_nothing_is_shared_and_the_experts_grow_apart(tmp_path):
    dense = dense_model("Llama")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    sparse = monge.hf.upcycle(dense, 4, 2, seed=3)
    text = [tokens(4, 12, seed) for seed in range(3)]
    assert len(audit(sparse, text).layers[0].duplicates) == 6
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(
        sparse.state_dict()[router], monge.hf.upcycle(dense, 4, 2, seed=3).state_dict()[router]
    )
    other = monge.hf.upcycle(dense, 4, 2)
    assert not torch.equal(sparse.state_dict()[router], other.state_dict()[router])
    sparse.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    assert torch.equal(again(ids).logits, sparse(ids).logits)
    monge.hf.use_router(sparse, "prices")
    train(sparse, steps=8)
    assert not audit(sparse, text).layers[0].duplicates
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_in_bfloat16_the_rotary_embedding_keeps_its_precision(tmp_path):
    dense_model("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sparse = monge.hf.upcycle(dense, 4, 2)
    assert sparse.dtype == torch.bfloat16
    assert sparse.model.rotary_emb.inv_freq.dtype == dense.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = tokens()
    found, expected = sparse(ids).logits.float(), dense(ids).logits.float()
    assert (found - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), (4, 2), "Linear cannot be upcycled.*Llama"),
        (lambda: dense_model("Llama"), (1, 1), "num_experts must be at least 2"),
        (lambda: dense_model("Llama"), (4, 5), "top_k between 1"),
        (lambda: dense_model("Llama", attention_bias=True), (4, 2), "no place for what attention_bias"),
        (lambda: dense_model("Llama", mlp_bias=True), (4, 2), "no place for what mlp_bias"),
        (lambda: dense_model("Qwen3", **WINDOWS, max_window_layers=1), (4, 2), "layers are alike"),
    ],
)
def test_what_cannot_be_upcycled(model, sizes, message):
    with pytest.raises(ValueError, match=message):
        monge.hf.upcycle(model(), *sizes)
