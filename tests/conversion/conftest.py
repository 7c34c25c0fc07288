"""Tiny random models of every family, a tiny tokenizer and tiny text, all seeded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB = 320  # the tokenizer's 300 and some padding, as real checkpoints have
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA = {**DECODER, "head_dim": 8}
ENCODER = {name: value for name, value in DECODER.items() if not name.startswith(("num_key", "bos", "eos"))}

# family -> (configuration class, model class, configuration)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GEMMA, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER),
    "bert": ("BertConfig", "BertModel", ENCODER),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
    ),
}

WORDS = ["sun", "moon", "river", "stone", "light", "hill", "falls", "runs", "warm", "slowly", "over", "the"]


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(family, **config)``: a random model in eval mode, equal for equal arguments.

    Every parameter is random, biases and norms too: a forgotten one shows.
    """
    import transformers

    def make(family: str, **config: Any) -> Any:
        config_name, model_name, settings = FAMILIES[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, model_name)(
                getattr(transformers, config_name)(**{**settings, **config})
            )
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.15)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """``tiny_inputs(model)``: keyword arguments of its forward, seeded."""

    def make(model: Any, sequences: int = 2, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if (size := getattr(model.config, "image_size", None)) is not None:
            return {"pixel_values": torch.randn(sequences, 3, size, size, generator=generator)}
        return {"input_ids": torch.randint(0, 300, (sequences, length), generator=generator)}

    return make


def _write_text(folder: Path, files: int, words: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        draw = random.Random(f"{folder.name} {index}")
        (folder / f"{index:02d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(words)))
    return str(folder / "*.txt")


@pytest.fixture
def tiny_text(tmp_path: Path) -> Callable[..., str]:
    """``tiny_text(name="text", files=16, words=800)``: writes seeded random words; returns their glob."""

    def write(name: str = "text", files: int = 16, words: int = 800) -> str:
        return _write_text(tmp_path / name, files, words)

    return write


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 300 tokens with a chat template, as transformers holds it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    draw = random.Random(0)
    text = [" ".join(draw.choice(WORDS) for _ in range(200)) for _ in range(20)]
    bpe.train_from_iterator(text, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Callable[..., Path]:
    """``tiny_folder(family, shard="5GB", **config)``: a checkpoint of a tiny model and the tiny tokenizer."""

    def save(family: str, shard: str = "5GB", **config: Any) -> Path:
        folder = tmp_path / f"{family}-checkpoint"
        tiny_model(family, **config).save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save
