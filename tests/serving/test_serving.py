"""An exported SmolLM2 served by vLLM and by llama.cpp: their greedy tokens are those of transformers.

Run by `make test-serving`, which makes the model and the engines' environments; skipped where
MONGE_SERVED_MODEL names no model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from agreement import agreements
from engines import LLAMA_CPP, VLLM, Answer, ask, ask_llama_cpp, ask_vllm, serve_with_vllm, write_gguf

pytestmark = pytest.mark.serving

PROMPTS = [
    "Water is made of",
    "My fellow Americans,",
    "The capital of France is",
    "Once upon a time there was",
    "The state of the economy is such that",
]
COUNT = 32


@pytest.fixture(scope="module")
def served() -> Path:
    model = Path(os.environ["MONGE_SERVED_MODEL"]).resolve()
    config = json.loads((model / "config.json").read_text())
    assert config["num_experts_per_tok"] < config["num_local_experts"]  # a mixture, that routes
    for environment in (VLLM, LLAMA_CPP):
        assert (environment / "bin/python").exists(), f"{environment.name} is missing: make test-serving"
    return model


@pytest.fixture(scope="module")
def tokenizer(served):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(served)


@pytest.fixture
def reference(served):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def from_llama_cpp(served, tmp_path_factory) -> list[Answer]:
    folder = tmp_path_factory.mktemp("llama_cpp")
    file = folder / "model.gguf"
    try:
        write_gguf(served, file)
        return ask_llama_cpp(file, PROMPTS, COUNT, folder)
    finally:
        file.unlink(missing_ok=True)  # half a gigabyte


@pytest.fixture(scope="module")
def vllm_address(served, tmp_path_factory):
    with serve_with_vllm(served, tmp_path_factory.mktemp("vllm") / "log.txt") as address:
        yield address


@pytest.fixture(scope="module")
def from_vllm(vllm_address) -> list[Answer]:
    return ask_vllm(vllm_address, PROMPTS, COUNT)


def permute_routers(model) -> None:
    """Let every router choose other experts: the rows of its weights in another order."""
    generator = torch.Generator().manual_seed(0)
    permuted = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "router" in name:
                weight.copy_(weight[torch.randperm(len(weight), generator=generator)])
                permuted += 1
    assert permuted == model.config.num_hidden_layers


@pytest.mark.parametrize("engine", ["from_llama_cpp", "from_vllm"])
def test_greedy_tokens_are_those_of_transformers(engine, request, reference, tokenizer, capsys):
    answers = request.getfixturevalue(engine)
    found = agreements(reference, answers)
    with capsys.disabled():
        print(f"\n{engine.removeprefix('from_')}:")
        for prompt, answer, agreed in zip(PROMPTS, answers, found, strict=True):
            print(f"  {agreed}: {prompt!r} {answer['text']!r}")
    for prompt, answer, agreed in zip(PROMPTS, answers, found, strict=True):
        assert answer["prompt"] == tokenizer(prompt)["input_ids"], prompt
        assert len(answer["tokens"]) == COUNT, prompt
        assert agreed.holds, f"{prompt!r}: {agreed}"
    # A model with ties everywhere would hold too: most prompts go on together.
    assert sum(agreed.length >= 8 for agreed in found) >= 3, [str(agreed) for agreed in found]

    # The same comparison finds a model whose tokens go to other experts.
    permute_routers(reference)
    wrong = agreements(reference, answers)
    assert sum(not agreed.holds for agreed in wrong) >= 3, [str(agreed) for agreed in wrong]


def test_the_server_of_vllm_chats_and_names_its_model(vllm_address):
    body = {
        "model": "monge",
        "messages": [{"role": "user", "content": "What is water made of?"}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = ask(vllm_address, "/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert answer["model"] == "monge"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] == 8
