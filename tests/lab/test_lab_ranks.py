"""Two gloo processes that share every batch: the figures of one process, written once."""

from __future__ import annotations

import json
import os

import pytest
from ranks import on_ranks

from monge.lab import compare

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]


def rows_of(out):
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_two_processes_compare_as_one_does(make_config, tmp_path):
    config = make_config(routers=("dense", "switch", "prices"), steps=10)
    two, one = tmp_path / "two", tmp_path / "one"
    first, second = on_ranks(2, compare, config, two)
    alone = compare(config, one)
    assert first == second == json.loads((two / "summary.json").read_text())
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))
    kinds = [[(r["kind"], r["router"], r["step"]) for r in rows_of(out)] for out in (two, one)]
    assert kinds[0] == kinds[1]
    for row, other in zip(rows_of(two), rows_of(one)):
        for name in ("loss", "val_loss", "max_violation"):
            if row.get(name) is not None:
                assert row[name] == pytest.approx(other[name], rel=1e-3), (row["router"], row["step"], name)
        if row["kind"] == "load":
            assert row["loads"] == pytest.approx(other["loads"], abs=1e-3)
    assert [row["router"] for row in first] == [row["router"] for row in alone]
    again = on_ranks(2, compare, config, two)  # finished: the same command trains nothing
    assert again == [first, second]


def test_a_batch_that_does_not_divide_is_refused(make_config, tmp_path):
    with pytest.raises(Exception, match=r"batch=3 does not divide among 2 processes.*multiple of 2"):
        on_ranks(2, compare, make_config(batch=3), tmp_path / "out")
    assert not (tmp_path / "out").exists()
