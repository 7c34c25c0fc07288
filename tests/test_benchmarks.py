"""What the benchmarks compute from their timings: ratios of two files, fitted exponents, interleaving."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the package

from benchmarks import claims, compare, moe_growth

OLD = [
    {"case": "a", "T": 1, "ms": {"ours": 2.0, "theirs": 8}, "ratio": 4.0},
    {"case": "a", "T": 2, "ms": {"ours": 3.0}, "ratio": 0.0},
    {"case": "b", "T": 1, "ratio": 7.0},
]
NEW = [
    {"case": "a", "T": 2, "ms": {"ours": 6.0}, "ratio": 1.0},
    {"case": "a", "T": 1, "ms": {"ours": 1.0, "theirs": 8}, "ratio": 8.0},
    {"case": "c", "T": 1, "ratio": 7.0},
]


def test_ratios_pair_rows_by_what_they_are():
    assert compare.ratios(OLD, NEW) == {
        "a, T=2: ms, ours": 2.0,  # its ratio was 0: nothing to divide by
        "a, T=1: ms, ours": 0.5,
        "a, T=1: ms, theirs": 1.0,
        "a, T=1: ratio": 2.0,
    }


def test_equal_rows_pair_by_their_order():
    rows = [{"case": "a", "ratio": 1.0}, {"case": "a", "ratio": 2.0}]
    assert compare.ratios(rows, rows[::-1]) == {"a: ratio": 2.0, "a #2: ratio": 0.5}


def test_compare_prints_ratios_and_names_another_machine(tmp_path, monkeypatch, capsys):
    for name, rows, cores in (("old", OLD, 2), ("new", NEW, 4)):
        (tmp_path / name).write_text(json.dumps({"machine": {"cores": cores}, "rows": rows}))
    monkeypatch.setattr(
        sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new"), "--beyond", ".6"]
    )
    compare.main()
    assert capsys.readouterr().out.splitlines() == [
        "note: cores was 2 and is 4",
        "   2.000  a, T=2: ms, ours",
        "   2.000  a, T=1: ratio",
        "4 figures in both, of 6 and 6",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_compare_refuses_other_files(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(SystemExit, match="is not a file of benchmark rows"):
        compare.load(str(tmp_path / "x"))


def test_exponents_of_a_power_and_of_a_cliff():
    sizes = [1, 2, 4, 8]
    fitted, steepest = moe_growth.exponents(sizes, [5.0 * s**1.5 for s in sizes])
    assert fitted == pytest.approx(1.5)
    assert steepest == pytest.approx(1.5)
    assert moe_growth.exponents(sizes, [1.0, 2.0, 4.0, 64.0])[1] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("ours", "options", "verdict"),
    [
        ([1.0, 1.1, 1.2], {}, "holds"),  # .5 below, every seed alike
        ([2.0, 2.1, 2.2], {}, "does not hold"),
        ([1.5, 1.7, 1.6], {}, "not decidable"),
        ([1.0, 1.1, 1.2], {"less": False}, "does not hold"),
        ([1.0, 1.1, 1.2], {"threshold": -0.6}, "does not hold"),
        ([2.0, 2.1, 2.2], {"threshold": 0.4, "less": False}, "holds"),
        ([1.0, 1.1, 1.2], {"times": 0.5}, "does not hold"),
        ([0.0, 0.0, 0.0], {"than": None, "threshold": 1e-9}, "holds"),
        ([0.0, 0.0, 1.0], {"than": None, "threshold": 1e-9}, "not decidable"),
        ([1.0], {}, "not run"),
    ],
)
def test_a_claim_is_judged_by_its_interval(ours, options, verdict):
    runs = {
        "ours": {seed: {"val_loss": value} for seed, value in enumerate(ours)},
        "theirs": {seed: {"val_loss": value} for seed, value in enumerate([1.5, 1.6, 1.7])},
    }
    claim = claims.Claim("paper", "it is lower", "natural", "ours", **({"than": "theirs"} | options))
    told, judged, seeds = claims.judge(claim, runs)
    assert judged == verdict
    assert seeds == len(ours)
    assert bool(told) == (verdict != "not run")


def test_a_measure_is_a_path_or_a_difference():
    record = {"corrupted": {"random tokens": {"0.15": 0.5}}, "a": 3.0, "b": 1.0}
    runs = {"ours": {0: record, 1: record}}
    for measure, value in (("corrupted/random tokens/0.15", "+0.5000"), ("a - b", "+2.0000")):
        told, _, _ = claims.judge(claims.Claim("", "", "", "ours", measure=measure), runs)
        assert told.startswith(value)
