"""`monge audit` on tiny checkpoints, from the words to the page; `monge report` draws it again."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path

import pytest
from viz.test_viz_conversion_report import Tables

import monge
from monge.cli import main

sys.path.insert(0, str(Path(__file__).parent / "hf"))
from hf_models import VOCAB, tiny, train

WORDS = ["sun", "moon", "river", "stone", "light", "hill"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two checkpoints, one of them with prices beside it, and two kinds of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("audit")
    draw = random.Random(0)
    for kind, words in (("day", WORDS[:4]), ("night", WORDS[2:])):
        (root / kind).mkdir()
        for index in range(4):
            text = " ".join(draw.choice(words) for _ in range(900))
            (root / kind / f"{index}.txt").write_text(text)
    vocabulary = {word: i for i, word in enumerate([*WORDS, *map(str, range(VOCAB - len(WORDS)))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")
    model = tiny("Mixtral")
    for name in ("plain", "priced"):
        if name == "priced":
            monge.hf.use_router(model, "prices")
            train(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def words_for(place: Path, name: str, out: Path, *more: str) -> list[str]:
    text = [str(place / kind / "*.txt") for kind in ("day", "night")]
    sizes = ["--tokens", "512", "--length", "32", "--batch", "4", "--threads", "1"]
    return ["audit", str(place / name), "--text", *text, "--out", str(out), *sizes, *more]


def test_the_audit_of_a_checkpoint(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words_for(place, "plain", out)) == 0
    printed = capsys.readouterr().out
    for said in (
        "imbalance",
        "1.25",
        "experts are",
        "about the text's domain",
        "In bfloat16",
        "one expert less",
    ):
        assert said in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == 1024
    assert summary["loss_stock"] is None
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == [0, 1]
    assert sum(rows[0]["load"]) == 2048
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == "audit"
    assert config["model"]["architecture"] == "MixtralForCausalLM"
    page = Tables((out / "report.html").read_text())
    cells = next(row for row in page.rows if row[0] == "0")
    assert cells[1] == "2 of 4"
    assert page.tags.count("figure") == 2
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert {"loads.png", "loads.svg", "layers.png", "layers.svg"} <= {path.name for path in out.iterdir()}

    before = (out / "records.jsonl").read_bytes(), (out / "report.html").read_bytes()
    assert main(words_for(place, "plain", out)) == 0  # again, to the same figures
    assert main(["report", str(out)]) == 0
    assert ((out / "records.jsonl").read_bytes(), (out / "report.html").read_bytes()) == before


def test_prices_beside_the_checkpoint_are_used(place, tmp_path, capsys):
    assert main(words_for(place, "priced", tmp_path / "out", "--no-precision")) == 0
    assert "Routed by transformers alone" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["loss_stock"] != summary["loss_checked"]
    assert summary["leak_training"] == 0
    assert summary["flips"] is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["router"] == "prices"


def test_an_unfinished_audit_says_so(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words_for(place, "plain", out)) == 0
    (out / "records.jsonl").unlink()
    (out / "summary.json").unlink()
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "Unfinished" in page
    assert "<figure>" not in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "300"], "at most half of tokens"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--capacity-factors", "-1"], "must be positive"),
    ],
)
def test_bad_usage(place, tmp_path, capsys, more, message):
    assert main(words_for(place, "plain", tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_other_folders_and_dense_models_are_refused(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words_for(place, "plain", out)) == 0
    assert main(words_for(place, "priced", out)) == 2
    assert main(["report", str(out), "--beside", str(out)]) == 2
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).save_pretrained(place / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "dense" / name).write_bytes((place / "plain" / name).read_bytes())
    capsys.readouterr()
    assert main(words_for(place, "dense", tmp_path / "dense")) == 2
    assert "no mixture layers" in capsys.readouterr().err.replace("\n", " ")
