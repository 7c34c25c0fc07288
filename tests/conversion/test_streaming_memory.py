"""A checkpoint larger than what its conversion may hold in memory, written, converted and reloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, BOUND = 40, 450_000_000
SIZES = {
    "vocab_size": 320,  # that of the tiny tokenizer
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}

CONVERT = """
import json, sys
import torch
from monge.conversion import ConvertConfig, convert, load
from monge.workspace.memory import peak_bytes, reset_peak

small, large, text, out = sys.argv[1:]
config = ConvertConfig(
    method="random", experts=16, refit=False, text=(text,), tokens=512, length=32, eval_tokens=256, threads=1
)
convert(small, config, out=out + "/small", stream=True)  # imports and compiles what there is
assert reset_peak("cpu")
before = peak_bytes("cpu")
result = convert(large, config, out=out + "/large", stream=True)
taken = peak_bytes("cpu") - before
ids = torch.arange(8)[None]
with torch.no_grad():
    torch.testing.assert_close(result.model(ids).logits, load(result.path)(ids).logits, rtol=1e-4, atol=1e-4)
print(json.dumps({"taken": taken, "whole": peak_bytes("cpu") - before, **result.summary}))
"""


def write_checkpoint(folder: Path, layers: int) -> int:
    """Random weights, a layer at a time, in a shard each; returns their bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    places, total = {}, 0
    for shard in [*(f"model.layers.{i}." for i in range(layers)), ""]:
        mine = [name for name in shapes if name not in places and name.startswith(shard)]
        tensors = {name: torch.randn(shapes[name]) * 0.02 + (len(shapes[name]) == 1) for name in mine}
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident peak of a stretch is Linux's")
def test_a_conversion_takes_less_memory_than_its_checkpoint(tmp_path, tiny_tokenizer, tiny_text):
    sizes = {}
    for name, layers in (("small", 1), ("large", LAYERS)):
        (tmp_path / name).mkdir()
        sizes[name] = write_checkpoint(tmp_path / name, layers)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    try:
        arguments = [*(tmp_path / name for name in sizes), tiny_text(), tmp_path / "out"]
        command = [sys.executable, "-c", CONVERT, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout.splitlines()[-1])
        files = sorted((tmp_path / "out" / "large" / "model").glob("*.safetensors"))
    finally:
        for name in ("large", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    assert sizes["large"] > 2 * BOUND
    assert len(files) > LAYERS / 2
    assert figures["taken"] < BOUND
    assert figures["whole"] > sizes["large"]  # loaded whole it does take its size: the measure sees it
    print(f"checkpoint {sizes['large'] / 1e6:.0f} MB, taken {figures['taken'] / 1e6:.0f} MB")
