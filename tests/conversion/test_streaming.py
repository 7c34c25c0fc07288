"""Layers that stay on disk: the same checkpoint as the ordinary conversion, with a bounded part in memory."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupting import Stop, StopsAt
from safetensors.torch import load_file, save_file

from monge.conversion import ConvertConfig, convert, load
from monge.conversion.on_disk import in_memory, layers_on_disk
from monge.conversion.source import open_model


@pytest.fixture
def config(tiny_text):
    return ConvertConfig(
        experts=6, shared=0.34, text=(tiny_text(),), tokens=1024, length=32, eval_tokens=256, threads=1
    )


def ids():
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def output(model):
    with torch.no_grad():
        found = model(ids())
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "options", "change"),
    [
        ("llama", {"shard": "20KB"}, {}),
        ("llama", {"tie_word_embeddings": True}, {"layers": (0, 2), "gates": "binary"}),
        ("qwen3", {}, {"method": "weight_kmeans", "router": "analytic", "refit": False, "shared": 0.0}),
        ("gemma2", {}, {}),
        ("bert", {}, {}),
    ],
    ids=str,
)
def test_the_checkpoint_is_that_of_the_ordinary_conversion(
    tiny_folder, config, tmp_path, family, options, change
):
    folder, config = tiny_folder(family, **options), replace(config, **change)
    whole = convert(folder, config, out=tmp_path / "whole")
    streamed = convert(folder, config, out=tmp_path / "streamed", stream=True)
    a, b = weights(whole.path), weights(streamed.path)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        files = [path / name for path in (whole.path, streamed.path)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_text() == files[1].read_text(), name
    for name, value in whole.summary.items():
        if name not in ("seconds", "peak_memory_bytes"):
            assert streamed.summary[name] == pytest.approx(value, rel=1e-4), name
    assert torch.equal(output(load(streamed.path)), output(load(whole.path)))
    torch.testing.assert_close(output(streamed.model), output(whole.model), rtol=1e-5, atol=1e-5)
    rows = [
        [json.loads(line) for line in (tmp_path / out / "records.jsonl").read_text().splitlines()]
        for out in ("whole", "streamed")
    ]
    for row, other in zip(*rows, strict=True):
        assert row.keys() == other.keys()
        assert row.get("error", 0.0) == pytest.approx(other.get("error", 0.0), rel=1e-4)


def test_interrupted_it_goes_on_to_the_same_bits(tiny_folder, config, tmp_path):
    folder = tiny_folder("llama")
    whole = convert(folder, config, out=tmp_path / "whole")
    for stage, step in (("convert", 2), ("evaluate", 1)):
        with pytest.raises(Stop):
            convert(folder, config, out=tmp_path / "out", observer=StopsAt(stage, step), stream=True)
    resumed = convert(folder, config, out=tmp_path / "out", stream=True)
    a, b = weights(whole.path), weights(resumed.path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_layer_has_values_only_while_it_is_used(tiny_folder):
    folder = tiny_folder("llama", shard="20KB")
    dense, model = open_model(folder).model, open_model(folder, stream=True).model
    layers = layers_on_disk(model)
    assert list(layers) == [f"model.layers.{i}" for i in range(3)]
    seen = []

    def note(*_):
        seen.append([name for name, layer in layers.items() if not next(layer.parameters()).is_meta])

    for layer in layers.values():
        layer.mlp.register_forward_hook(note)
    assert torch.equal(output(model), output(dense))
    assert seen == [[name] for name in layers]
    assert all(p.is_meta for layer in layers.values() for p in layer.parameters())
    assert not any(p.is_meta for name, p in model.named_parameters() if ".layers." not in name)
    first = layers["model.layers.0"]
    with in_memory(first):
        with in_memory(first):
            weight = first.mlp.up_proj.weight
        assert first.mlp.up_proj.weight is weight
        assert torch.equal(weight, dense.model.layers[0].mlp.up_proj.weight)
    assert first.mlp.up_proj.weight.is_meta
    with pytest.raises(Stop), in_memory(first):
        raise Stop
    assert first.mlp.up_proj.weight.is_meta


def test_a_forward_that_fails_lets_go_of_its_layer(tiny_folder):
    model = open_model(tiny_folder("llama"), stream=True).model
    layer = model.model.layers[1]

    def stop(*_):
        raise Stop

    for module in (layer, layer.mlp):  # before the layer runs, and within
        handle = module.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            output(model)
        handle.remove()
        assert all(p.is_meta for p in layer.parameters())


def test_weights_in_half_precision_are_read_in_float32(tiny_folder, tiny_model):
    folder = tiny_folder("llama")
    save_file(
        {k: v.bfloat16() for k, v in weights(folder).items()}, folder / "model.safetensors", {"format": "pt"}
    )
    model = open_model(folder, stream=True).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(output(model), output(open_model(folder).model))


def test_a_model_goes_with_its_last_reference(tiny_folder):
    model = open_model(tiny_folder("llama"), stream=True).model
    output(model)
    gc.collect()
    layer = weakref.ref(model.model.layers[0])
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight missing.*save_pretrained"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra unexpected for LlamaForCausalLM"),
        (lambda t: t["model.layers.2.mlp.down_proj.weight"].fill_(float("nan")), "layers.2.*NaN"),
        (lambda t: t["lm_head.weight"].fill_(float("inf")), "lm_head.weight holds NaN or infinite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_any_work(tiny_folder, config, tmp_path, change, message):
    folder = tiny_folder("llama")
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        convert(folder, config, out=tmp_path / "out", stream=True)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dot"}, "method 'dot' needs the whole model.*leave --stream out"),
        ({"method": "gradient"}, "method 'gradient' needs"),
        ({"method": "static"}, "static pruning needs"),
        ({"router": "trained"}, "router 'trained' needs"),
        ({"minutes": 1.0}, "fine-tuning needs"),
    ],
    ids=str,
)
def test_what_needs_the_whole_model_is_refused(tiny_folder, config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert(tiny_folder("llama"), replace(config, **change), out=tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()


def test_only_a_checkpoint_into_a_folder_can_be_streamed(tiny_folder, tiny_model, config, tmp_path):
    with pytest.raises(ValueError, match="into a folder"):
        convert(tiny_folder("llama"), config, stream=True)
    with pytest.raises(ValueError, match="checkpoint's folder"):
        convert(tiny_model("llama"), config, out=tmp_path / "out", stream=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="cannot be streamed"):
        convert(tmp_path / "model.gguf", config, out=tmp_path / "out", stream=True)
