"""`convert` as a user calls it: folders in, checkpoints out, the same after every interruption."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from interrupting import Stop, StopsAt

from monge import MoE
from monge.conversion import ConvertConfig, convert, load


@pytest.fixture
def config(tiny_text):
    return ConvertConfig(
        experts=6,
        shared=0.34,
        text=(tiny_text(),),
        tokens=1024,
        length=32,
        eval_tokens=256,
        threads=1,
        align_steps=4,
    )


def logits(model):
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


def test_a_folder_becomes_a_standard_checkpoint_with_its_records(tiny_folder, config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    result = convert(tiny_folder("llama"), config, out=out)
    assert result.path == out / "model"
    reloaded = AutoModelForCausalLM.from_pretrained(result.path).eval()
    torch.testing.assert_close(logits(reloaded), logits(result.model), rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(result.path).chat_template
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= {
        "perplexity", "perplexity_dense", "kl", "agreement", "ffn_active", "params_active", "params_total",
        "seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert summary["ffn_active"] == pytest.approx(0.5)
    stored = json.loads((out / "config.json").read_text())
    lists = [set(names) for names in stored["data"]["files"].values()]
    assert len(lists) == 3
    assert all(lists)
    assert not (lists[0] & lists[1] | lists[0] & lists[2] | lists[1] & lists[2])
    kinds = [json.loads(line)["kind"] for line in (out / "records.jsonl").read_text().splitlines()]
    assert kinds.count("layer") == kinds.count("layer_eval") == 3
    assert "eval" in kinds


@pytest.mark.parametrize(
    "change",
    [
        {"method": "static"},
        {"method": "gradient"},
        {"method": "dot"},
        {"method": "dot", "start_from": "ot_lloyd"},
        {"method": "random", "router": "trained"},
        {"minutes": 0.02},
        {"minutes": 0.02, "trainable": "low_rank", "rank": 2},
        {"gates": "binary"},
    ],
    ids=str,
)
def test_every_way_to_convert_ends_in_a_model_that_loads(tiny_folder, config, tmp_path, change):
    result = convert(tiny_folder("llama"), replace(config, **change), out=tmp_path / "out")
    torch.testing.assert_close(logits(load(result.path)), logits(result.model), rtol=1e-3, atol=1e-4)
    moes = [module for module in result.model.modules() if isinstance(module, MoE)]
    assert len(moes) == (0 if change.get("method") == "static" else 3)


def test_a_module_is_copied_and_nothing_is_written_without_a_folder(tiny_model, tiny_tokenizer, config):
    model = tiny_model("llama")
    before = logits(model)
    result = convert(model, config, tokenizer=tiny_tokenizer)
    assert result.path is None
    assert torch.equal(logits(model), before)
    assert isinstance(result.model.model.layers[0].mlp, MoE)
    assert result.summary["kl"] > 0


def test_an_encoder_is_judged_by_its_embeddings(tiny_model, tiny_tokenizer, config):
    result = convert(tiny_model("bert"), config, tokenizer=tiny_tokenizer)
    assert 0.5 < result.summary["cosine"] < 1
    assert "perplexity" not in result.summary


def test_images_calibrate_a_model_that_reads_no_text(tiny_model, config):
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result = convert(tiny_model("vit"), config, inputs=images)
    assert result.summary["ffn_active"] == pytest.approx(0.5)


def test_interrupted_anywhere_the_same_command_ends_in_the_same_bits(tiny_folder, config, tmp_path):
    folder = tiny_folder("llama")
    config = replace(config, method="dot", minutes=0.05)
    first = convert(folder, config, out=tmp_path / "first")
    steps = json.loads((tmp_path / "first" / "config.json").read_text())["finetune_steps"]
    out = tmp_path / "second"
    for stage, step in (("joint training", 2), ("convert", 2), ("teacher", 1), ("evaluate", 1)):
        with pytest.raises(Stop):
            convert(folder, config, out=out, observer=StopsAt(stage, step))
        stored = json.loads((out / "config.json").read_text())
        if stage == "convert":  # the budget is machine time: give both runs the same steps
            stored["finetune_steps"] = steps
            (out / "config.json").write_text(json.dumps(stored))
    second = convert(folder, config, out=out)
    for (name, a), b in zip(
        first.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert {**second.summary, "seconds": 0, "peak_memory_bytes": 0} == {
        **first.summary,
        "seconds": 0,
        "peak_memory_bytes": 0,
    }


def test_a_killed_process_goes_on(tiny_folder, config, tmp_path):
    folder, out = tiny_folder("llama"), tmp_path / "out"
    program = textwrap.dedent(f"""
        import os, signal
        from monge.conversion import ConvertConfig, convert
        from monge.conversion.observer import Silent
        class Killed(Silent):
            def advance(self, steps=1, note=""):
                if "error" in note:
                    os.kill(os.getpid(), signal.SIGKILL)
        convert({str(folder)!r}, ConvertConfig(**{dict(vars(config))!r}), out={str(out)!r}, observer=Killed())
    """)
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ})
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    result = convert(folder, config, out=out)
    whole = convert(folder, config, out=tmp_path / "whole")
    assert torch.equal(logits(result.model), logits(whole.model))


@pytest.mark.parametrize("written", ["streams", "layer-001", "finetune", "summary"])
def test_a_disk_that_fills_up_leaves_a_folder_that_can_go_on(
    tiny_folder, config, tmp_path, monkeypatch, written
):
    folder, out = tiny_folder("llama"), tmp_path / "out"
    config = replace(config, minutes=0.02)
    take_name = os.replace

    def full(temporary, path):
        if written in os.path.basename(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        take_name(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr("monge.workspace.writing.os.replace", full)
        with pytest.raises(OSError, match=rf"cannot write .*{written}.*No space left.*repeat the command"):
            convert(folder, config, out=out)
    assert not list(out.rglob("*.tmp"))
    assert not (out / "summary.json").exists()
    result = convert(folder, config, out=out)
    torch.testing.assert_close(logits(load(result.path)), logits(result.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "kmeans"}, "no method 'kmeans'.*ot_lloyd"),
        ({"to": "gpt5"}, "no target 'gpt5'"),
        ({"start_from": "ot_lloyd"}, "start_from='ot_lloyd' is for method dot"),
        ({"method": "static", "router": "trained"}, "static pruning has no experts"),
        ({"method": "static", "layers": (0, 1)}, "static pruning needs all layers"),
        ({"experts": 64}, "experts=64"),
        ({"tokens": 10_000_000}, "too little text"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(tiny_folder, config, tmp_path, change, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        convert(tiny_folder("llama"), replace(config, **change), out=out)
    assert not (out / "model").exists()
    assert not (out / "config.json").exists()


def test_a_folder_of_another_conversion_is_not_touched(tiny_folder, config, tmp_path):
    folder, out = tiny_folder("llama"), tmp_path / "out"
    convert(folder, config, out=out)
    with pytest.raises(ValueError, match=r"seed \(was 0, now 1\)"):
        convert(folder, replace(config, seed=1), out=out)
