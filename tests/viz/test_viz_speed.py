"""The page of `monge bench`: the records' ratios in words, tables and bars, whole from any part of them."""

from __future__ import annotations

import json

import pytest
from viz.test_viz_report import Page

from monge.viz.speed import figure_paths, headline, read_speed, tables, write_report

INFERENCE = {
    "kind": "inference", "dtype": "float32", "experts": 64, "active": 16, "phase": "decode", "path": "gemv",
    "ms": {"dense": 8.0, "monge": 2.0, "eager": 4.0, "grouped_mm": 5.0},
    "times_dense": {"dense": 1.0, "monge": 4.0, "eager": 2.0, "grouped_mm": 1.6},
}  # fmt: skip
TRAINING = {
    "kind": "training", "dtype": "float32", "layer": "MoE(<8>, 8, 8, 2)", "ms": {"dense": 9.0, "monge": 10.0},
    "flops_of_dense": {"dense": 1.0, "monge": 0.9, "grouped_mm": 0.75},
    "peak_bytes": {"dense": 0, "monge": 2**20, "grouped_mm": 3 * 2**20},
}  # fmt: skip
MODELS = [
    {
        "kind": "model",
        "model": "m",
        "name": name,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": 10.0,
    }
    for name, prefill in (("dense", 100.0), ("dense without FFNs", 300.0), ("monge", 150.0))
]


def write_fake_run(out, rows, *, complete=True):
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"command": "bench", "config": {"dim": 8, "repeats": 3}}))
    (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        (out / "summary.json").write_text(json.dumps({"rows": rows}))
    return out


def test_the_page_says_what_the_records_say(tmp_path):
    out = write_fake_run(tmp_path / "run", [INFERENCE, TRAINING, *MODELS])
    run = read_speed(out)
    assert "4.0 times at decode (25 % active)" in headline(run)
    assert "2.00 in the least favourable case (decode, 25 %, float32)" in headline(run)
    (_, columns, rows), training, models = tables(run)
    assert dict(zip(columns, rows[0], strict=True)) == {
        "case": "decode, 25 %, float32", "path": "gemv", "monge": "4.00", "eager": "2.00",
        "grouped_mm": "1.60", "over the best": "2.00",
    }  # fmt: skip
    assert training[2] == [["MoE(<8>, 8, 8, 2), float32", "0.90", "0.75", "1 MiB", "3 MiB"]]
    assert models[2][2] == ["monge", "150.0", "1.50", "10.0", "1.00"]
    write_report(out)
    page = Page((out / "report.html").read_text())
    assert "Unfinished" not in page.words
    assert "<8>" in page.words  # escaped: what a name holds is text, no tag
    assert [path.name for path in figure_paths(out)] == [
        f"{name}.{kind}" for name in ("inference", "models", "training") for kind in ("png", "svg")
    ]


def test_the_headline_tells_of_whatever_was_measured(tmp_path):
    def told(*rows):
        return headline(read_speed(write_fake_run(tmp_path / str(len(list(tmp_path.iterdir()))), rows)))

    assert told() == "Nothing has been measured yet."
    step = "A training step of MoE(<8>, 8, 8, 2) in float32 reaches 0.90 of the dense FFN's FLOP/s."
    whole = "The model as a whole writes 1.00 and reads 1.50 times as fast as the dense one."
    assert told(TRAINING) == step
    assert told(*MODELS) == whole
    assert told(TRAINING, *MODELS) == f"{step} {whole}"
    assert told(INFERENCE, TRAINING, *MODELS).endswith(f"{step} {whole}")
    assert told(*MODELS[1:]) == "The model as a whole writes 10.0 tokens a second and reads 150.0."


def test_the_same_records_give_the_same_bytes(tmp_path):
    pages = [
        write_report(write_fake_run(tmp_path / name / "run", [INFERENCE, TRAINING, *MODELS])).read_bytes()
        for name in ("a", "b")
    ]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("rows", [[], [INFERENCE], [TRAINING], MODELS[1:]])
def test_an_unfinished_run_has_a_page_too(tmp_path, rows):
    out = write_fake_run(tmp_path / "run", rows, complete=False)
    assert "Unfinished" in Page(write_report(out).read_text()).words


def test_another_commands_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"command": "audit", "config": {}}))
    with pytest.raises(ValueError, match="is of `monge audit`, not of `monge bench`"):
        read_speed(tmp_path)
