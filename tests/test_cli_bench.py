"""`monge bench` at tiny sizes, from the words to the page; repeated, it measures only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import monge.speed
from monge.cli import main

SIZES = ["--dim", "32", "--hidden", "8", "--experts", "4", "--active", "1", "2", "--repeats", "1"]
SHORT = [*SIZES, "--layers", "--phases", "decode", "--dtypes", "float32", "--threads", "1"]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_the_table_and_the_page(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", *SHORT, "--out", str(out)]) == 0
    rows = rows_of(out)
    assert [(row["phase"], row["active"], row["path"]) for row in rows] == [
        ("decode", 1, "gemv"),
        ("decode", 2, "gemv"),
    ]
    for row in rows:
        assert set(row["times_dense"]) == {"dense", "monge", "eager", "batched_mm", "grouped_mm"}
        assert row["times_dense"]["dense"] == 1.0
        ratio = row["ms"]["dense"] / row["ms"]["monge"]
        assert row["times_dense"]["monge"] == pytest.approx(ratio)
    assert json.loads((out / "summary.json").read_text())["rows"] == rows
    shown = capsys.readouterr().out
    assert "decode, 25 %, float32" in shown
    assert "decode, 50 %, float32" in shown
    assert (out / "report.html").exists()


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["bench", *SHORT, "--out", str(out)]
    assert main(words) == 0
    first, second = (out / "records.jsonl").read_text().splitlines()
    (out / "records.jsonl").write_text(first + "\n")
    measured = []
    whole = monge.speed.measure_experts
    monkeypatch.setattr(
        monge.speed, "measure_experts", lambda config, case: measured.append(case) or whole(config, case)
    )
    assert main(words) == 0
    assert [case["active"] for case in measured] == [2]
    assert rows_of(out)[0] == json.loads(first)
    assert {**rows_of(out)[1], "ms": 0, "times_dense": 0} == {**json.loads(second), "ms": 0, "times_dense": 0}
    assert main([*words, "--repeats", "2"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--active", "9", "--experts", "4"], "active must be in 1..4"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--phases", "prefil"], "phases has ['prefil']; known: decode, 32 tokens, prefill"),
        (["--against", "x"], "--against is the dense model beside --model"),
    ],
)
def test_bad_words(words, said, tmp_path, capsys):
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
