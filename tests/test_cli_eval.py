"""`monge eval` and `monge generate` on tiny models, from the words to the tables."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console

from monge.cli import main
from monge.cli.eval_tables import print_evaluation
from monge.cli.observing import StageBar, StageLines, make_stage_progress

WORDS = ["sun", "moon", "river", "stone", "light", "hill", "falls", "runs", "warm", "slowly", "over", "the"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny dense Llama, a narrower one, and text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from monge.conversion.ffn import find_ffns

    root = tmp_path_factory.mktemp("eval")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(400)) for _ in range(16)]
    (root / "text").mkdir()
    for index, text in enumerate(texts):
        (root / "text" / f"{index:02d}.txt").write_text(text)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    for ffn in find_ffns(model):
        ffn.narrow(ffn.read().select(torch.arange(16)))
    model.config.intermediate_size = 16
    model.save_pretrained(root / "pruned")
    tokenizer.save_pretrained(root / "pruned")
    return root


def words_for(place: Path, out: Path) -> list[str]:
    words = ["eval", str(place / "pruned"), "--against", str(place / "dense"), "--out", str(out)]
    words += ["--text", str(place / "text" / "*.txt"), "--tokens", "512", "--length", "32"]
    return [*words, "--layer-tokens", "64", "--threads", "1"]


def test_eval_prints_its_tables_and_writes_its_files(place, tmp_path, capsys):
    words = words_for(place, tmp_path / "out")
    assert main([*words, "--speed"]) == 0
    printed = capsys.readouterr().out
    for said in ("perplexity", "held-out", "dense", "converted", "oracle neurons", "FFN neurons active"):
        assert said in printed
    for said in ("50.0 %", "decoding, tokens/s", "Layers: relative error", "quality, held-out: 16 steps"):
        assert said in printed
    assert str(tmp_path / "out" / "summary.json") in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"{summary['perplexity']:.3f}" in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "records.jsonl", "summary.json", "report.html"} <= written


def test_repeating_the_command_measures_nothing_again(place, tmp_path, capsys):
    words = [*words_for(place, tmp_path / "out"), "--no-speed", "--no-neighbours"]
    assert main(words) == 0
    first = capsys.readouterr().out
    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    assert main(words) == 0
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == records
    table = first[first.index("perplexity") :].splitlines()[:4]
    assert "\n".join(table) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--tasks", "chess"], "there is no task chess"),
        (["--against", "{place}/nothing"], "neither a folder nor a file"),
        (["--text", "{place}/nothing/*.txt"], "matches no file"),
        (["--tokens", "99999"], "too little text"),
        (["--out", "{place}/taken"], "settings"),
    ],
)
def test_bad_usage_is_one_paragraph(place, tmp_path, capsys, change, said):
    if "taken" in change[-1]:
        assert main([*words_for(place, place / "taken"), "--no-speed", "--no-neighbours"]) == 0
        change = [*change, "--batch", "1"]
    words = words_for(place, tmp_path / "out") + [word.format(place=place) for word in change]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_generate_writes_the_same_text_twice_and_goes_on_from_the_prompt(place, capfd):
    words = ["generate", str(place / "dense"), "--prompt", "the sun", "--tokens", "12"]
    assert main(words) == 0
    first = capfd.readouterr()
    assert first.out.startswith("the sun")
    assert len(first.out) > len("the sun") + 1
    assert "tokens/s" in first.err
    assert main(words) == 0
    assert capfd.readouterr().out == first.out
    assert main([*words, "--temperature", "2", "--seed", "1"]) == 0
    assert capfd.readouterr().out != first.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--tokens", "-1"], "tokens must be at least 1"),
        (["--chat"], "no chat template"),
    ],
)
def test_generate_names_bad_input(place, capfd, change, said):
    assert main(["generate", str(place / "dense"), "--prompt", "the sun", *change]) == 2
    assert said in capfd.readouterr().err


def test_tasks_and_encoders_have_their_tables():
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    task = {"task": "piqa", "metric": "acc", "count": 20, "chance": 0.5, "accuracy": 0.6}
    task |= {"accuracy_dense": 0.7, "retained": 6 / 7, "retained_above_chance": None}
    summary = {"cosine": 0.97, "ffn_active": 0.5, "seconds": 70.0, "peak_memory_bytes": 2**30}
    summary |= {"tasks": [task, task | {"task": "sciq"}], "retained": 6 / 7, "retained_above_chance": 0.5}
    row = {"kind": "eval", "model": "converted", "text": "held-out", "chunks": 9, "cosine": 0.97}
    print_evaluation(console, [row | {"cosine_min": 0.9}], summary)
    text = console.export_text()
    for said in ("0.9700", "0.9000", "piqa (acc)", "85.7 %", "mean", "1 min 10 s", "1.0 GiB"):
        assert said in text


def test_a_terminal_gets_a_bar_and_a_file_lines(capsys, monkeypatch):
    terminal = Console(force_terminal=True, width=80, highlight=False)
    assert isinstance(make_stage_progress(terminal), StageBar)
    assert type(make_stage_progress(Console())) is StageLines
    with make_stage_progress(terminal) as progress:
        progress.stage("layers", 3)
        progress.advance(2, "error 0.3")
        progress.message("[not markup]")
        assert "error 0.3" in progress.bar.tasks[0].description
        assert "left" in progress.bar.tasks[0].description
    out = capsys.readouterr().out
    assert "done" in out
    assert "[not markup]" in out
    lines = StageLines(Console(width=80))
    lines.stage("layers", 3)
    lines.told -= 60
    lines.advance()
    assert "1/3" in capsys.readouterr().out
