"""Tiny causal language models for the tests of joint training, one of them made of a known MoE.

Shapes: H model width, F neurons, N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from monge.conversion.types import ExpertShape

VOCAB = 48


def tiny_llama(layers: int = 2, width: int = 16, neurons: int = 24, *, std: float = 0.3) -> LlamaForCausalLM:
    """With weights large enough for the FFNs to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=std,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """Plain MLPs with biases, kept as transposed linear maps; tied embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def token_chunks(count: int = 6, batch: int = 2, length: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB, (batch, length), generator=generator) for _ in range(count)]


def planted(N: int = 4, each: int = 6) -> tuple[LlamaForCausalLM, Tensor, ExpertShape]:
    """One layer whose FFN is an exact MoE of N experts, and the expert of every neuron, shuffled.

    Token v belongs to cluster v mod N. Its embedding lies in the cluster's own block of features, around 1,
    so that a linear router can tell clusters apart. Attention adds nothing, and the neurons of an expert read
    one block: on the tokens of other clusters they are exactly 0.
    """
    H, F = 4 * N, each * N
    model = tiny_llama(layers=1, width=H, neurons=F)
    labels_F = (torch.arange(F) % N)[torch.randperm(F)]
    block_H = torch.arange(H) // 4
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        own = (torch.arange(VOCAB) % N)[:, None] == block_H
        model.model.embed_tokens.weight.copy_((1 + 0.5 * torch.randn(VOCAB, H)) * own)
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.copy_(torch.randn(F, H) * (labels_F[:, None] == block_H))
        layer.mlp.down_proj.weight.copy_(0.5 * torch.randn(H, F))
    return model, labels_F, ExpertShape(F, N, 1, 0)
