"""A whole evaluation in its folder: what it writes, that it resumes, what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from converted_models import convert_by_hand

from monge.conversion.evaluation import EvalConfig, compare_models, evaluate
from monge.conversion.evaluation.study import HELD_OUT, read_texts
from monge.conversion.evaluation.summary import summarise
from monge.conversion.exporting import export
from monge.conversion.observer import Silent
from monge.workspace.records import Records


class Interrupt(Silent):
    """Stops an evaluation after so many steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt


@pytest.fixture
def place(tmp_path, tiny_model, tiny_inputs, tiny_tokenizer, tiny_text):
    """Folders of a dense and a converted model, and text."""

    def make(family: str = "llama", to: str = "monge", **changes):
        dense = tiny_model(family)
        converted = convert_by_hand(copy.deepcopy(dense), tiny_inputs(dense))
        dense.save_pretrained(tmp_path / "dense")
        tiny_tokenizer.save_pretrained(tmp_path / "dense")
        export(converted, tmp_path / "model", tokenizer=tiny_tokenizer, to=to)
        config = {"tokens": 640, "length": 32, "layer_tokens": 64, "speed": False, "threads": 1, **changes}
        config.setdefault("text", (tiny_text(),))
        config = EvalConfig(**config)
        folders = str(tmp_path / "model"), str(tmp_path / "dense")
        return dense, converted, folders, config

    return make


def rows_of(out, kind):
    return [row for row in Records(out / "records.jsonl").rows if row["kind"] == kind]


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("to", ["monge", "auto"])
def test_a_whole_evaluation(place, tmp_path, tiny_text, tiny_tokenizer, to):
    other = tiny_text("other", files=3)
    dense, converted, folders, config = place(to=to, other=(other,), speed=True)
    out = tmp_path / "out"
    summary = evaluate(*folders, config, out=out)
    assert json.loads((out / "summary.json").read_text()) == summary
    texts, files = read_texts(tiny_tokenizer, config)
    quality = compare_models(dense, converted, texts[HELD_OUT])
    assert quality.tokens == 20 * 31
    for name in ("perplexity", "perplexity_dense", "kl", "agreement"):
        assert summary[name] == pytest.approx(getattr(quality, name), rel=1e-4), name
    assert summary["ratio"] == summary["perplexity"] / summary["perplexity_dense"]
    assert summary["ffn_active"] == 0.5
    assert summary["params_active"] < summary["params_active_dense"] < summary["params_total"]
    assert summary["decode_tokens_per_s"] > 0
    assert summary["peak_memory_bytes"] > summary["seconds"] > 0

    evals = {(row["text"], row["model"], row["k_offset"]): row for row in rows_of(out, "eval")}
    neighbours = [("converted", 0), ("converted", -1), ("converted", 1), ("oracle", 0)]
    assert list(evals) == [(HELD_OUT, *key) for key in neighbours] + [(other, "converted", 0)]
    assert evals[HELD_OUT, "oracle", 0]["kl"] < evals[HELD_OUT, "converted", 0]["kl"]
    layers = rows_of(out, "layer_eval")
    assert [row["layer"] for row in layers] == [0, 1, 2]
    assert all(sum(row["load"]) == 64 * 2 and 0 < row["oracle"] < row["error"] for row in layers)
    assert {row["model"] for row in rows_of(out, "speed")} == {"dense", "converted"}
    stored = json.loads((out / "config.json").read_text())
    assert stored["data"]["files"] == files
    assert stored["config"]["model"] == folders[0]
    assert all(":" in name for name in files[HELD_OUT])


def test_an_interrupted_evaluation_goes_on_to_the_same_figures(place, tmp_path):
    _, _, folders, config = place(batch=1)
    whole = evaluate(*folders, config, out=tmp_path / "whole")
    out = tmp_path / "resumed"
    for steps in (3, 13, 14):  # in the first part, in the second, in the layers
        with pytest.raises(KeyboardInterrupt):
            evaluate(*folders, config, out=out, observer=Interrupt(steps))
    resumed = evaluate(*folders, config, out=out)
    varying = ("seconds", "peak_memory_bytes")
    assert {k: v for k, v in resumed.items() if k not in varying} == {
        k: v for k, v in whole.items() if k not in varying
    }
    kinds = {row["kind"] for row in rows_of(out, "part") + rows_of(out, "eval") + rows_of(out, "layer_eval")}
    for kind in kinds:
        assert without_times(rows_of(out, kind)) == without_times(rows_of(tmp_path / "whole", kind))
    before = (out / "records.jsonl").read_bytes()
    assert evaluate(*folders, config, out=out)["kl"] == whole["kl"]
    assert (out / "records.jsonl").read_bytes() == before  # nothing is measured twice


def test_an_encoder_is_judged_by_its_embeddings(place, tmp_path):
    _, _, folders, config = place("bert")
    summary = evaluate(*folders, config, out=tmp_path / "out")
    assert -1 <= summary["cosine_min"] <= summary["cosine"] < 1
    assert "perplexity" not in summary
    assert summary["ffn_active"] == 0.5
    own = evaluate(folders[1], folders[1], config, out=tmp_path / "own")
    assert own["cosine"] == pytest.approx(1, abs=1e-6)


def test_a_dense_model_against_itself(place, tmp_path):
    _, _, folders, config = place()
    summary = evaluate(folders[1], folders[1], config, out=tmp_path / "out")
    assert (summary["kl"], summary["agreement"], summary["ratio"], summary["ffn_active"]) == (0, 1, 1, 1)
    assert [row["model"] for row in rows_of(tmp_path / "out", "eval")] == ["converted"]
    assert summary["layer_error"] < 1e-9


def test_bfloat16_is_another_model_than_float32(place, tmp_path):
    _, _, folders, config = place(neighbours=False)
    _, _, _, half = place(neighbours=False, dtype="bfloat16")
    kl = [evaluate(*folders, c, out=tmp_path / c.dtype)["kl"] for c in (config, half)]
    assert kl[0] != kl[1]
    assert kl[1] == pytest.approx(kl[0], rel=0.5)


def test_what_has_changed_since_the_folder_was_begun_is_refused(place, tmp_path, tiny_model, tiny_tokenizer):
    _, _, folders, config = place(neighbours=False)
    out = tmp_path / "out"
    evaluate(*folders, config, out=out)
    with pytest.raises(ValueError, match="batch"):
        evaluate(*folders, EvalConfig(**{**vars(config), "batch": 1}), out=out)
    held_out = json.loads((out / "config.json").read_text())["data"]["files"][HELD_OUT][0].split(": ")[1]
    text = tmp_path / "text" / held_out
    text.write_text(text.read_text().replace("moon", "hill"))
    with pytest.raises(ValueError, match="the text has changed"):
        evaluate(*folders, config, out=out)
    tiny_model("llama", rms_norm_eps=1e-3).save_pretrained(tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="dense model has changed"):
        evaluate(*folders, config, out=out)


def test_models_that_do_not_belong_together_are_refused(place, tmp_path, tiny_folder, tiny_tokenizer):
    _, _, folders, config = place()
    with pytest.raises(ValueError, match="bert-checkpoint an encoder"):
        evaluate(folders[0], tiny_folder("bert"), config, out=tmp_path / "out")
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["unheard-of"])
    other.save_pretrained(folders[0])
    with pytest.raises(ValueError, match=r"tokenizers of model and dense differ"):
        evaluate(*folders, config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"length": 512, "tokens": 256}, "at most tokens"),
        ({"limit": -1}, "limit must not be negative"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"tasks": ("piqa", "chess")}, "there is no task chess"),
    ],
)
def test_settings_out_of_range_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        EvalConfig(**change)


def test_the_summary_keeps_what_is_above_chance():
    def task(model, name, accuracy):
        row = {"kind": "task", "model": model, "task": name, "accuracy": accuracy, "metric": "acc"}
        return row | {"chance": 0.5 if name == "piqa" else 0.25, "count": 20, "seconds": 1.0}

    rows = [{"kind": "eval", "model": "converted", "text": "t", "cosine": 1.0, "cosine_min": 1.0}]
    rows += [task("dense", "piqa", 0.7), task("converted", "piqa", 0.6)]
    rows += [task("dense", "sciq", 0.25), task("converted", "sciq", 0.35)]
    summary = summarise(rows, "t")
    first, second = summary["tasks"]
    assert first["retained"] == pytest.approx(6 / 7)
    assert first["retained_above_chance"] == pytest.approx(0.5)
    assert second["retained_above_chance"] is None  # the dense model only guesses
    assert summary["retained"] == pytest.approx(0.95 / 0.95)
    assert summary["retained_above_chance"] == pytest.approx(0.2 / 0.2)
    assert summary["seconds"] == 4


def test_the_evaluation_text_is_the_one_no_conversion_sees(tiny_text, tiny_tokenizer):
    from monge.conversion import ConvertConfig
    from monge.conversion.corpus import open_corpus

    text = (tiny_text(),)
    corpus = open_corpus(tiny_tokenizer, ConvertConfig(text=text, tokens=512, eval_tokens=64, length=32))
    _, files = read_texts(tiny_tokenizer, EvalConfig(text=text, tokens=640, length=32))
    assert files[HELD_OUT] == corpus.lists["evaluation"]
    assert not {*files[HELD_OUT]} & {*corpus.lists["calibration"], *corpus.lists["selection"]}
    assert torch.get_num_threads() >= 1
