"""Monge checkpoints and standard ones, read back; damaged ones, named."""

from __future__ import annotations

import json

import pytest
import torch
from converted_models import convert_by_hand
from export_cases import logits_of
from safetensors.torch import load_file, save_file

from monge.conversion.building import describe_moe
from monge.conversion.exporting import export
from monge.conversion.loading import load
from monge.moe import MoE


@pytest.fixture
def converted(tiny_model, tiny_inputs):
    def make(family, how=None, **config):
        model = tiny_model(family, **config)
        return convert_by_hand(model, tiny_inputs(model), **(how or {}))

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gpt2", "bert", "vit", "phi3"])
def test_a_monge_checkpoint_is_the_same_model(family, tied, converted, tiny_inputs, tmp_path):
    model = converted(family, {"layers": [0, 2]}, **({"tie_word_embeddings": True} if tied else {}))
    inputs = tiny_inputs(model)
    out = export(model, tmp_path / "moe")
    assert not [p for p in out.iterdir() if p.suffix not in (".json", ".safetensors", ".md")]
    again = load(out)
    assert type(again) is type(model)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert sum(isinstance(m, MoE) for m in again.modules()) == 2
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-5, atol=1e-5)
    again.train()
    out = again(**inputs)
    (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean().backward()
    trained = [name for name, p in again.named_parameters() if "experts" in name and p.grad is None]
    assert not trained


@pytest.mark.parametrize("gates", ["standard", "binary", "sigmoid"])
def test_shapes_of_layers_may_differ(gates, converted, tiny_inputs, tmp_path):
    def shape_of(layer, shape):
        return shape._replace(groups=8 - layer, active=4 - layer, shared=(layer + 1) % 3)

    model = converted("llama", {"shape_of": shape_of, "gates": gates}, mlp_bias=True)
    again = load(export(model, tmp_path / "moe"))
    shapes = [[describe_moe(m) for m in x.modules() if isinstance(m, MoE)] for x in (model, again)]
    assert shapes[0] == shapes[1]
    assert len({tuple(s.items()) for s in shapes[0]}) == 3
    torch.testing.assert_close(logits_of(again, tiny_inputs(model)), logits_of(model, tiny_inputs(model)))


def test_text_generation_settings_come_back(converted, tmp_path):
    model = converted("gemma")
    model.generation_config.max_new_tokens = 17
    assert load(export(model, tmp_path / "moe")).generation_config.max_new_tokens == 17


def test_bfloat16_comes_back(converted, tmp_path):
    again = load(export(converted("gpt2"), tmp_path / "moe", dtype="bfloat16"))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_standard_checkpoints_load_through_transformers(converted, tiny_inputs, tiny_folder, tmp_path):
    model = converted("llama")
    again = load(export(model, tmp_path / "moe"))
    assert type(again).__name__ == "GraniteMoeSharedForCausalLM"
    assert not again.training
    torch.testing.assert_close(
        logits_of(again, tiny_inputs(model)), logits_of(model, tiny_inputs(model)), rtol=1e-4, atol=1e-5
    )
    assert type(load(tiny_folder("bert"))).__name__ == "BertModel"
    assert type(load(tiny_folder("qwen2", shard="50KB"))).__name__ == "Qwen2ForCausalLM"


def test_an_export_can_be_exported_again(converted, tiny_inputs, tmp_path):
    model = converted("gemma")
    again = load(export(load(export(model, tmp_path / "one")), tmp_path / "two"))
    torch.testing.assert_close(logits_of(again, tiny_inputs(model)), logits_of(model, tiny_inputs(model)))
    standard = load(export(converted("llama"), tmp_path / "three"))
    half = load(export(standard, tmp_path / "four", dtype="bfloat16"))
    assert next(half.parameters()).dtype == torch.bfloat16


# ---------------------------------------------------------------------- damage


@pytest.fixture
def gpt2(converted, tmp_path):
    return export(converted("gpt2"), tmp_path / "moe")


def change(path, **values):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, **values}))


def test_missing_folder_and_files(gpt2, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"it holds no config.json"):
        load(tmp_path)
    (gpt2 / "model.safetensors").rename(gpt2 / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model.safetensors.*no pickles"):
        load(gpt2)


def test_missing_shard(tiny_folder):
    folder = tiny_folder("llama", shard="50KB")
    first = sorted(folder.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"lacks {first.name}"):
        load(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -8])
def test_cut_off_weights(gpt2, size):
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*anew"):
        load(gpt2)


def test_cut_off_weights_of_a_standard_checkpoint(converted, tmp_path):
    file = export(converted("llama"), tmp_path / "moe") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(file.parent)


def test_another_format(gpt2):
    change(gpt2 / "monge.json", format=2)
    with pytest.raises(ValueError, match=r"is of format 2, this version of Monge reads 1.*anew"):
        load(gpt2)


def test_not_json(gpt2):
    (gpt2 / "monge.json").write_text("{")
    with pytest.raises(ValueError, match=r"monge.json is not JSON"):
        load(gpt2)
    (gpt2 / "monge.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, not list"):
        load(gpt2)


def test_an_architecture_that_transformers_lacks(gpt2):
    change(gpt2 / "monge.json", model="HyenaForCausalLM")
    with pytest.raises(ValueError, match=r"'HyenaForCausalLM', which transformers .* does not have"):
        load(gpt2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: about.pop("layers"),
        lambda about: about["layers"].popitem(),
        lambda about: next(iter(about["layers"].values())).update(hidden=7),
        lambda about: next(iter(about["layers"].values())).update(color="red"),
        lambda about: next(iter(about["layers"].values())).update(gates="hard"),
        lambda about: about["layers"].update({"transformer.h.9.mlp": next(iter(about["layers"].values()))}),
    ],
)
def test_layers_that_do_not_fit(gpt2, damage):
    about = json.loads((gpt2 / "monge.json").read_text())
    damage(about)
    (gpt2 / "monge.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is not a whole Monge checkpoint"):
        load(gpt2)


@pytest.mark.parametrize("kind", ["missing", "left over", "NaN"])
def test_weights_that_do_not_fit(gpt2, kind):
    tensors = load_file(gpt2 / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "left over":
        tensors["transformer.h.7.ln_1.weight"] = torch.ones(3)
    else:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, gpt2 / "model.safetensors")
    about = r"transformer\.h\.7\.ln_1\.weight" if kind == "left over" else name.replace(".", r"\.")
    with pytest.raises(ValueError, match=f"(?=.*{kind})(?=.*{about})"):
        load(gpt2)
