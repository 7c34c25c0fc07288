"""The experiment end to end at toy size: records against their contract, observers, and errors kept kind."""

from __future__ import annotations

import errno
import json
import os
import statistics
from importlib import metadata

import pytest
import torch

from monge.lab import compare
from monge.workspace.text import INSTALL, find_domains

RUN = {"kind", "router", "seed", "step"}
ROUTING = {"val_loss_own", "train_max_violation", "max_violation", "dead_experts", "leak", "ms_route"}
CAPACITY = {"val_loss_cf1", "val_loss_cf125", "val_loss_own_cf1", "val_loss_own_cf125"}
MORE = {"val_loss_by_domain", "corrupted", "leak_kl", "specialisation", "bias_gap", "bias_gradient"}
COSTS = {"ms_step", "wall_s", "peak_memory_bytes", "ot_steps", "params_total", "params_active"}
FIELDS = {
    "train": RUN | {"loss", "tokens_per_s", "max_violation", "lr"},
    "load": RUN | {"layer", "loads"},
    "val": RUN | {"val_loss"},
    "eval": RUN | ROUTING | CAPACITY | MORE | COSTS | {"val_loss", "loads"},
}


class Journal:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def run_started(self, router, seed, steps, run_index, runs):
        self.events.append(("started", router, seed, steps, run_index, runs))

    def step(self, router, seed, step, steps, loss, tokens_per_s, max_violation):
        assert min(loss, tokens_per_s) > 0
        assert (max_violation is None) == (router == "dense")
        self.events.append(("step", router, seed, step))

    def run_finished(self, record):
        self.events.append(("finished", record["router"], record["seed"]))

    def message(self, text):
        self.events.append(("message", text))


def _rows(out):
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_an_experiment_leaves_what_the_contract_says(make_config, tmp_path):
    config = make_config(routers=("dense", "ssr", "maxscore"), seeds=2, layers=2)
    out, journal = tmp_path / "out", Journal()
    summary = compare(config, out, observer=journal)

    assert sorted(os.listdir(out)) == ["config.json", "records.jsonl", "summary.json", "tokenizer.json"]
    assert json.loads((out / "summary.json").read_text()) == summary

    stored = json.loads((out / "config.json").read_text())
    assert stored.keys() == {"command", "preset", "config", "versions", "machine", "data"}
    assert (stored["command"], stored["preset"], stored["config"]["steps"]) == ("compare", "quick", 20)
    assert stored["machine"].keys() == {"cpu", "cores", "threads"}
    assert stored["versions"]["torch"] == metadata.version("torch")
    (domain,) = stored["data"]["domains"]
    assert domain.keys() == {"name", "train_files", "val_files", "train_tokens", "val_tokens"}
    assert not set(domain["train_files"]) & set(domain["val_files"])

    rows = _rows(out)
    for row in rows:
        assert row.keys() == FIELDS[row["kind"]]
    for router in config.routers:
        for seed in (0, 1):
            mine = [row for row in rows if (row["router"], row["seed"]) == (router, seed)]
            steps = {kind: [row["step"] for row in mine if row["kind"] == kind] for kind in FIELDS}
            assert steps["train"] == [5, 10, 15, 20]
            assert steps["val"] == [8, 16]
            assert steps["eval"] == [20]
            assert steps["load"] == ([] if router == "dense" else [5, 5, 10, 10, 15, 15, 20, 20])
            assert mine[-1]["kind"] == "eval"
            for row in mine:
                if row["kind"] == "load":
                    assert sum(row["loads"]) == pytest.approx(1)
            assert [sum(loads) for loads in mine[-1]["loads"]] == pytest.approx([1, 1] * (router != "dense"))

    for row in summary:
        evals = [r for r in rows if r["kind"] == "eval" and r["router"] == row["router"]]
        losses = [r["val_loss"] for r in evals]
        assert row["seeds"] == 2
        assert row["val_loss_mean"] == statistics.fmean(losses)
        assert row["val_loss_std"] == statistics.stdev(losses)
        assert (row["steps"], row["tokens"]) == (20, 20 * 4 * 16)
        first, second = row["router"], summary[summary.index(row) - 1]["router"]
        theirs = {r["seed"]: r["val_loss"] for r in rows if r["kind"] == "eval" and r["router"] == second}
        mean = statistics.fmean(r["val_loss"] - theirs[r["seed"]] for r in evals)
        assert row["minus"][second]["mean"] == pytest.approx(mean)
        assert row["minus"].keys() == {r for r in config.routers if r != first}
        assert row["synthetic"] is False
        assert row["ms_step"] == statistics.fmean(r["ms_step"] for r in evals)
    dense, ssr, maxscore = summary
    assert all(
        dense[name] is None for name in ("val_loss_own_mean", *(ROUTING - {"val_loss_own"}), "ot_steps")
    )
    assert maxscore["train_max_violation"] == 0.0  # 4 experts divide the 128 slots of a step
    assert ssr["train_max_violation"] > 0
    assert ssr["leak"] > 0
    assert maxscore["leak"] > 0
    assert 0 < ssr["ot_steps"] < 2 * 20
    assert dense["params_active"] < ssr["params_active"] < ssr["params_total"]

    runs = [(router, seed) for seed in (0, 1) for router in config.routers]
    expected = []
    for index, (router, seed) in enumerate(runs):
        expected += [("started", router, seed, 20, index, 6)]
        expected += [("step", router, seed, step) for step in range(1, 21)]
        expected += [("finished", router, seed)]
    assert journal.events == expected


def test_training_teaches_and_seeds_repeat(make_config, tmp_path):
    config = make_config(routers=("dense", "prices"), steps=60)
    first = compare(config, tmp_path / "a")
    second = compare(config, tmp_path / "b")
    for row, again in zip(first, second):
        assert row["val_loss_mean"] == again["val_loss_mean"] < 4.5 < torch.log(torch.tensor(300.0))
    assert first[0]["val_loss_std"] is None


def test_a_finished_experiment_is_only_summed_up_again(make_config, tmp_path):
    config, out = make_config(routers=("topk",)), tmp_path / "out"
    summary = compare(config, out)
    before = (out / "records.jsonl").read_bytes()
    (out / "summary.json").unlink()
    journal = Journal()
    assert compare(config, out, observer=journal) == summary
    assert [event[0] for event in journal.events] == ["started", "finished"]
    assert (out / "records.jsonl").read_bytes() == before


def test_the_number_of_threads_is_set_and_put_back(make_config, tmp_path):
    before = torch.get_num_threads()
    compare(make_config(routers=("dense",), steps=1), tmp_path / "out")
    assert torch.get_num_threads() == before
    assert json.loads((tmp_path / "out" / "config.json").read_text())["machine"]["threads"] == 1


def test_other_settings_in_the_same_folder_are_refused_by_name(make_config, tmp_path):
    out = tmp_path / "out"
    compare(make_config(routers=("topk",)), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"lr \(was 0\.004, now 0\.1\).*--out") as error:
        compare(make_config(routers=("topk", "ssr"), lr=0.1, clip=0.5), out)
    assert "clip (was 1.0, now 0.5)" in str(error.value)
    assert "steps" not in str(error.value)
    assert "routers" not in str(error.value)  # more of them are welcome
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_changed_text_is_refused(make_config, tmp_path):
    config = make_config(routers=("topk",))
    compare(config, tmp_path / "out")
    (tmp_path / "text" / "03.txt").write_text("moon " * 600)
    with pytest.raises(ValueError, match="the text has changed"):
        compare(config, tmp_path / "out")


@pytest.mark.parametrize("content", ["{}", "not json", '{"command": "convert"}', "[1]"])
def test_a_folder_of_something_else_is_left_alone(make_config, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json was not written by `monge compare`"):
        compare(make_config(), out)
    assert os.listdir(out) == ["config.json"]
    assert (out / "config.json").read_text() == content


@pytest.mark.parametrize("name", ["tokenizer.json", "records.jsonl", "summary.json"])
def test_files_of_something_else_are_not_overwritten(make_config, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"holds {name} of something else"):
        compare(make_config(), tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_a_kill_before_the_tokenizer_was_saved_does_no_harm(make_config, tmp_path):
    config, out = make_config(routers=("dense",)), tmp_path / "out"
    summary = compare(config, out)
    for name in ("tokenizer.json", "summary.json", "records.jsonl"):
        (out / name).unlink()
    assert compare(config, out)[0]["val_loss_mean"] == summary[0]["val_loss_mean"]
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"routers": ("topk", "topp")}, "there is no router 'topp'; routers may name dense, topk"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"text": ("nothing/*.txt",)}, f"matches no file.*{INSTALL}"),
    ],
)
def test_bad_settings_make_no_folder(make_config, tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        compare(make_config(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverging_loss_is_named_with_its_step(make_config, tmp_path, monkeypatch):
    from monge.lab import comparison

    def broken(router, config, seed, images):
        model = build(router, config, seed, images)
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        return model

    build = comparison.build_model
    monkeypatch.setattr(comparison, "build_model", broken)
    with pytest.raises(ValueError, match=r"dense, seed 0: the loss became nan at step 1\. Lower lr"):
        compare(make_config(), tmp_path / "out")


def test_a_disk_that_fills_up_leaves_a_folder_that_can_go_on(make_config, tmp_path, monkeypatch):
    config = make_config(routers=("prices",))
    expected = compare(config, tmp_path / "whole")
    out = tmp_path / "out"
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 5:  # config.json, tokenizer.json, then the third checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"prices-0\.safetensors: No space left on device"):
            compare(config, out)
    assert os.listdir(out / "checkpoints") == ["prices-0.safetensors"]
    assert compare(config, out)[0]["val_loss_mean"] == expected[0]["val_loss_mean"]


def test_options_are_spelled_and_name_the_runs(make_config, tmp_path):
    routers = ("ssr:p=1", "ssr:p=0", "switch:capacity_factor=1.0", "maxscore:gates=annealed")
    summary = compare(make_config(routers=routers, annealing=0.5), tmp_path / "out")
    assert [row["router"] for row in summary] == list(routers)
    assert [row["ot_steps"] for row in summary[:2]] == [20, 0]
    assert summary[2]["val_loss_own_mean"] == pytest.approx(summary[2]["val_loss_cf1"])
    assert summary[2]["val_loss_own_mean"] != summary[2]["val_loss_mean"]


def test_a_synthetic_bias_unbalances_and_is_marked(make_config, tmp_path):
    config = make_config(routers=("topk",), experts=8, top_k=2, router_bias=5.0, steps=4)
    (row,) = compare(config, tmp_path / "out")
    assert row["synthetic"] is True
    assert row["bias_gap"] == pytest.approx(5.0, abs=0.1)
    assert row["max_violation"] > 2.5  # two of eight experts take nearly everything


def test_a_missing_optional_package_is_told_and_does_no_harm(make_config, tmp_path, monkeypatch):
    from monge.lab import folder

    monkeypatch.setattr(folder, "missing_packages", lambda packages: ["anarchism"])
    text = make_config().text
    monkeypatch.setattr(folder, "find_domains", lambda globs, packages: find_domains(text))
    journal = Journal()
    compare(make_config(routers=("dense",), text=(), steps=1), tmp_path / "out", observer=journal)
    said = "without anarchism, not installed here (`apt-get install anarchism`)"
    assert ("message", said) in journal.events
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"]["note"] == said
