"""A tiny model of every architecture that `monge.hf.use_router` knows, and tokens for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 48
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
NARROW = {"intermediate_size": 24, "moe_intermediate_size": 8}  # of dense layers and of experts
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 8, "num_local_experts": 4},
    "Qwen2Moe": {**NARROW, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {**NARROW, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True},
    "Olmoe": {"intermediate_size": 8, "num_experts": 4},
    "DeepseekV3": {**NARROW, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "Glm4Moe": {**NARROW, "n_routed_experts": 4, "head_dim": 8, "first_k_dense_replace": 1},
    "GraniteMoe": {"intermediate_size": 8, "num_local_experts": 4},
    "GraniteMoeShared": {"intermediate_size": 8, "num_local_experts": 4, "shared_intermediate_size": 8},
}
SIGMOID = ("DeepseekV3", "Glm4Moe")


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model with routers that have something to say; in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model.eval()


def tokens(batch: int = 3, length: int = 10, seed: int = 1) -> Tensor:
    """(batch, length) random ids."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def train(model: Any, steps: int = 3, **inputs: Tensor) -> None:
    """A few steps as the README tells; ends in evaluation mode."""
    import monge

    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model.train()
    for step in range(steps):
        ids = tokens(seed=step)
        loss = model(input_ids=ids, labels=ids, **inputs).loss + monge.aux_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monge.step(model)
    model.eval()
