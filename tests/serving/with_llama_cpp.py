"""Greedy tokens from llama.cpp, as JSON: run by the Python of its own environment, which has no monge.

    python with_llama_cpp.py MODEL.gguf PROMPTS.json COUNT > ANSWERS.json

PROMPTS.json is a list of texts. The answer is a list of {"prompt": token ids of the text, "tokens": COUNT
token ids that follow, "text": what they say}. An end of text is a token like any other.

Everything is computed in float32 on one thread. Two defaults of llama.cpp are not: keys and values kept in
float16, and flash attention, which on a CPU moved logits of a converted SmolLM2 by 0.7 (without it: 3e-5).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cyllama.llama.llama_cpp import (
    LlamaContext,
    LlamaContextParams,
    LlamaModel,
    LlamaModelParams,
    LlamaSampler,
    LlamaSamplerChainParams,
    disable_logging,
    ggml_backend_load_all,
    llama_batch_get_one,
)

FLOAT32 = 0
"""ggml's number for the type."""
WITHOUT = 0
"""llama.cpp's number for attention without its flash kernel."""


def greedy(model: LlamaModel, prompt: str, count: int) -> dict[str, object]:
    """The ``count`` likeliest tokens after ``prompt``, one after the other."""
    vocab = model.get_vocab()
    ids = vocab.tokenize(prompt, add_special=True, parse_special=False)
    params = LlamaContextParams()
    params.n_ctx = len(ids) + count
    params.type_k = params.type_v = FLOAT32
    params.flash_attn_type = WITHOUT
    params.n_threads = params.n_threads_batch = 1
    context = LlamaContext(model, params)
    sampler = LlamaSampler(LlamaSamplerChainParams())
    sampler.add_greedy()
    context.decode(llama_batch_get_one(ids, 0))
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(sampler.sample(context, -1))
        context.decode(llama_batch_get_one(tokens[-1:], len(ids) + len(tokens) - 1))
    return {"prompt": list(ids), "tokens": tokens, "text": vocab.detokenize(tokens)}


if __name__ == "__main__":
    disable_logging()
    ggml_backend_load_all()
    opened = LlamaModel(sys.argv[1], LlamaModelParams())
    prompts = json.loads(Path(sys.argv[2]).read_text())
    json.dump([greedy(opened, prompt, int(sys.argv[3])) for prompt in prompts], sys.stdout)
