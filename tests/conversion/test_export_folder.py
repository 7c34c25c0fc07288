"""What an export's folder holds, and that it appears whole or not at all."""

from __future__ import annotations

import json
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from converted_models import convert_by_hand, narrow_by_hand
from export_cases import logits_of
from safetensors import safe_open
from safetensors.torch import load_file

from monge.conversion.exporting import TARGETS, export, folder
from monge.conversion.exporting.structure import Structure
from monge.conversion.exporting.targets import ARCHITECTURES
from monge.conversion.exporting.tensors import renamed_tensors
from monge.conversion.loading import load


@pytest.fixture
def converted(tiny_model, tiny_inputs):
    model = tiny_model("llama")
    return convert_by_hand(model, tiny_inputs(model))


def contents(path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_folder_holds_everything_an_engine_reads(converted, tiny_tokenizer, tmp_path):
    card = {
        "title": "Tiny, divided",
        "license": "apache-2.0",
        "base_model": "tiny/llama",
        "figures": {"perplexity": 23.456789, "perplexity_dense": 20.0, "tokens": 4096},
        "source": "tiny-llama",
        "seed": 0,
    }
    converted.generation_config.temperature = 0.6  # saved with do_sample False by many checkpoints
    out = export(converted, tmp_path / "new" / "moe", tokenizer=tiny_tokenizer, card=card)
    assert out == tmp_path / "new" / "moe"
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md", "monge.json",
             "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # fmt: skip
    assert set(contents(out)) == names == set(json.loads((out / "monge.json").read_text())["files"])
    assert not [p for p in out.parent.iterdir() if p != out]
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1  # who may read the one may read the other

    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "the sun"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: the sun\n"
    assert transformers.GenerationConfig.from_pretrained(out).temperature == 0.6
    text = (out / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: "transformers"\n')
    for line in ('license: "apache-2.0"', "# Tiny, divided", "| perplexity | 23.46 |", "| tokens | 4,096 |",
                 "| source | tiny-llama |", "2 of 6 experts of 6 neurons beside a shared expert of 12",
                 "GraniteMoeSharedForCausalLM.from_pretrained"):  # fmt: skip
        assert line in text, line
    assert json.loads((out / "monge.json").read_text())["card"] == card


def test_model_and_tokenizer_of_a_result(converted, tiny_tokenizer, tmp_path):
    out = export(SimpleNamespace(model=converted, tokenizer=tiny_tokenizer), tmp_path / "moe")
    assert (out / "tokenizer.json").exists()


def test_dtype(converted, tmp_path):
    source = converted.config.to_dict()
    whole = load_file(export(converted, tmp_path / "float") / "model.safetensors")
    half = load_file(export(converted, tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    assert {t.dtype for t in whole.values()} == {torch.float32}
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(converted.parameters()).dtype == torch.float32
    assert converted.config.to_dict() == source


def test_many_files(converted, tiny_inputs, tmp_path, monkeypatch):
    expected = logits_of(load(export(converted, tmp_path / "one")), tiny_inputs(converted))
    monkeypatch.setattr(folder, "LARGEST_FILE", 60_000)
    out = export(converted, tmp_path / "many")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [p.name for p in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    sizes = 0
    for path in files:
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
            assert {index["weight_map"][key] for key in file.keys()} == {path.name}  # noqa: SIM118
        size = sum(t.nbytes for t in tensors)
        assert size <= 60_000 or len(tensors) == 1
        sizes += size
    assert sizes == index["metadata"]["total_size"]
    assert torch.equal(logits_of(load(out), tiny_inputs(converted)), expected)


def test_weights_are_views(tiny_model, tiny_inputs):
    """Nothing is held twice: what is renamed shares the model's memory."""
    model = tiny_model("llama")
    convert_by_hand(model, tiny_inputs(model), groups=6, active=3, shared=1)  # experts of 8: no padding
    structure = Structure(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for target in ("granitemoeshared", "mixtral"):
        for name, tensor in renamed_tensors(structure, ARCHITECTURES[target]):
            assert tensor.untyped_storage().data_ptr() in own, name
            assert tensor.is_contiguous(), name


def test_an_earlier_export_is_replaced_and_nothing_else(converted, tmp_path):
    out = export(converted, tmp_path / "moe", to="qwen2_moe")
    export(converted, out)
    assert json.loads((out / "monge.json").read_text())["target"] == "granitemoeshared"
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match=r"no export wrote \(notes.txt\)"):
        export(converted, out)
    other = tmp_path / "other"
    other.mkdir()
    export(converted, other)  # empty: may be used
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export(converted, tmp_path / "file")
    assert contents(out) == before


def test_a_killed_export_is_swept_away(converted, tmp_path):
    (tmp_path / ".moe.tmp").mkdir()
    (tmp_path / ".moe.tmp" / "0.part").write_bytes(b"half")
    export(converted, tmp_path / "moe")
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_kill_between_the_two_renames_loses_nothing(converted, tmp_path, monkeypatch, fails):
    before = contents(export(converted, tmp_path / "moe").rename(tmp_path / ".moe.old"))
    if fails:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(OSError, match="0 MiB free"):
            export(converted, tmp_path / "moe", dtype="bfloat16")
        assert contents(tmp_path / "moe") == before
    else:
        export(converted, tmp_path / "moe", dtype="bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_nothing(converted, tmp_path, earlier):
    """A limit on the size of files stands for the disk that fills up while the weights are written."""
    out = tmp_path / "moe"
    before = contents(export(converted, out)) if earlier else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*moe.*nothing was left behind"):
            export(converted, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == (["moe"] if earlier else [])
    assert before is None or contents(out) == before


def test_too_little_space_is_noticed_before_anything_is_written(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match="MiB are needed and 1 MiB free"):
        export(converted, tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(converted, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(converted, tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "bert", "vit", "phi3"])
def test_static_pruning_stays_the_same_architecture(family, tiny_model, tiny_inputs, tmp_path):
    model = narrow_by_hand(tiny_model(family), 20)
    source = model.config.to_dict()
    out = export(model, tmp_path / "narrow")
    assert json.loads((out / "monge.json").read_text())["target"] == "dense"
    assert model.config.to_dict() == source
    again = load(out)
    assert type(again) is type(model)
    width = "n_inner" if family == "gpt2" else "intermediate_size"
    assert getattr(again.config, width) == 20
    torch.testing.assert_close(
        logits_of(again, tiny_inputs(model)), logits_of(model, tiny_inputs(model)), rtol=1e-5, atol=1e-5
    )
    half = load(export(model, tmp_path / "half", dtype="bfloat16"))
    assert next(half.parameters()).dtype == torch.bfloat16


def test_layers_pruned_to_different_widths_are_refused(tiny_model, tmp_path):
    model = narrow_by_hand(tiny_model("llama"), 20, layers=[1])
    with pytest.raises(ValueError, match=r"\[20, 48\] neurons.*prune all layers alike"):
        export(model, tmp_path / "narrow")
    assert list(tmp_path.iterdir()) == []


def test_targets_are_described():
    assert list(TARGETS) == [*ARCHITECTURES, "dense", "monge"]
