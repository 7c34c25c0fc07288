"""Generated text against a plain loop over logits."""

from __future__ import annotations

import copy

import pytest
import torch
from converted_models import convert_by_hand

from monge.conversion.exporting import export
from monge.conversion.generation import generate_text
from monge.conversion.opening import open_any

PROMPT = "the sun falls over the river"


@pytest.fixture(scope="module")
def models(tiny_model, tiny_inputs):
    dense = tiny_model("llama")
    return {"dense": dense, "converted": convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense))}


def greedy(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            following = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
        if following.item() == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["dense", "converted"])
def test_greedy_text_is_that_of_the_loop_and_is_streamed(models, tiny_tokenizer, name):
    pieces: list[str] = []
    text = generate_text(models[name], tiny_tokenizer, PROMPT, tokens=24, on_text=pieces.append)
    assert text == greedy(models[name], tiny_tokenizer, PROMPT, 24)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert generate_text(models[name], tiny_tokenizer, PROMPT, tokens=24, seed=5) == text


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(models, tiny_tokenizer):
    state = torch.get_rng_state()
    text = [
        generate_text(models["dense"], tiny_tokenizer, PROMPT, tokens=24, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert text[0] == text[1] != text[2]
    assert torch.equal(torch.get_rng_state(), state)
    cold = generate_text(models["dense"], tiny_tokenizer, PROMPT, tokens=12, temperature=1e-4)
    assert cold == generate_text(models["dense"], tiny_tokenizer, PROMPT, tokens=12)


def test_chat_wraps_the_prompt_in_the_template(models, tiny_tokenizer):
    said = generate_text(models["dense"], tiny_tokenizer, PROMPT, tokens=12, chat=True)
    assert said == generate_text(models["dense"], tiny_tokenizer, f"user: {PROMPT}\n", tokens=12)


@pytest.mark.parametrize("to", ["monge", "auto"])
def test_an_export_goes_on_as_its_model_does(models, tiny_tokenizer, tmp_path, to):
    folder = export(models["converted"], tmp_path / "model", tokenizer=tiny_tokenizer, to=to)
    source = open_any(folder)
    assert source.causal
    text = generate_text(source.model, source.tokenizer, PROMPT, tokens=24)
    assert text == generate_text(models["converted"], tiny_tokenizer, PROMPT, tokens=24)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature not negative"),
        ({"tokens": 600}, "the context of 512"),
    ],
)
def test_bad_input_is_named(models, tiny_tokenizer, change, said):
    with pytest.raises(ValueError, match=said):
        generate_text(models["dense"], tiny_tokenizer, **{"prompt": PROMPT, **change})


def test_a_tokenizer_without_template_and_an_encoder_are_refused(models, tiny_tokenizer, tiny_model):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate_text(models["dense"], bare, PROMPT, chat=True)
    with pytest.raises(ValueError, match="BertModel is no causal"):
        generate_text(tiny_model("bert"), tiny_tokenizer, PROMPT)
    with pytest.raises(ValueError, match="no causal"):
        generate_text(models["dense"], None, PROMPT)


def test_a_damaged_monge_checkpoint_is_named(models, tiny_tokenizer, tmp_path):
    folder = export(models["converted"], tmp_path / "model", tokenizer=tiny_tokenizer, to="monge")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{")
    with pytest.raises(ValueError, match="the tokenizer in"):
        open_any(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_any(folder)
