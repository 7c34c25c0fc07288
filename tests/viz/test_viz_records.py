"""Reading what a comparison left: complete, cut off in the middle of a line, resumed, or not a comparison."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from viz.fake_records import EXPERTS, LAYERS, write_fake_run

from monge.viz.records import read_comparison


def leaves(value, path=()):
    """The numbers of nested dictionaries by their path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def test_a_complete_folder_is_read_whole(tmp_path):
    comparison = read_comparison(write_fake_run(tmp_path, seeds=2, routers=("dense", "prices"), steps=200))
    assert comparison.routers == ["dense", "prices"]
    assert comparison.complete
    assert (comparison.planned_runs, comparison.finished_runs, comparison.seeds) == (4, 4, 2)
    steps, losses_SN = comparison.curve("train", "prices", "loss")
    assert losses_SN.shape == (2, len(steps))
    assert (np.diff(steps) > 0).all()
    assert steps[-1] == 200
    steps, loads_NLE = comparison.loads("prices")
    assert loads_NLE.shape == (len(steps), LAYERS, EXPERTS)
    np.testing.assert_allclose(loads_NLE.sum(-1), 1.0)
    assert comparison.curve("train", "dense", "max_violation")[1].size == 0


def test_only_what_was_asked_for_last_is_shown(tmp_path):
    out = write_fake_run(tmp_path, routers=("dense", "topk", "ssr"), seeds=3, steps=80)
    config = json.loads((out / "config.json").read_text())
    config["config"] |= {"routers": ["topk", "dense"], "seeds": 2}
    (out / "config.json").write_text(json.dumps(config))
    comparison = read_comparison(out)
    assert comparison.routers == ["topk", "dense"]
    assert (comparison.planned_runs, comparison.finished_runs) == (4, 4)
    assert len(comparison.curve("train", "topk", "loss")[1]) == 2


def test_an_unfinished_folder_gives_means_over_the_finished_runs(tmp_path):
    whole = read_comparison(write_fake_run(tmp_path / "whole", routers=("topk", "ssr"), seeds=3, steps=80))
    part = read_comparison(
        write_fake_run(tmp_path / "part", routers=("topk", "ssr"), seeds=3, steps=80, interrupt_after=5)
    )
    assert not part.complete
    by_router = {row["router"]: row for row in part.rows}
    assert [by_router[name]["seeds"] for name in ("topk", "ssr")] == [3, 2]
    losses = [r["val_loss"] for r in part.of("eval", "topk")]
    assert by_router["topk"]["val_loss_mean"] == statistics.fmean(losses)
    assert by_router["topk"]["val_loss_std"] == statistics.stdev(losses)
    # What this file computes is what the summary of the finished comparison says.
    for name, value in next(row for row in whole.rows if row["router"] == "topk").items():
        if name not in ("tokens", "minus"):
            assert dict(leaves(by_router["topk"][name])) == pytest.approx(dict(leaves(value))), name
    assert "minus" not in by_router["topk"]  # intervals come with the summary, when every run is in


def test_a_run_under_way_does_not_bend_the_mean(tmp_path):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=3, steps=80, interrupt_after=2)
    steps, losses_SN = read_comparison(out).curve("train", "topk", "loss")
    assert len(losses_SN) == 2
    assert steps[-1] == 80


@pytest.mark.parametrize("tail", ['{"kind": "train", "router": "to', '{"kind": 1}\n[]\n', "\ud800\n"])
def test_a_cut_or_foreign_line_is_passed_over(tmp_path, tail):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=1, steps=80)
    before = read_comparison(out)
    with (out / "records.jsonl").open("a", errors="surrogatepass") as file:
        file.write(tail)
    assert read_comparison(out).records == before.records


def test_the_last_writer_of_a_step_wins(tmp_path):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=1, steps=80)
    again = {"kind": "train", "router": "topk", "seed": 0, "step": 40, "loss": 1.25}
    with (out / "records.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    steps, losses_SN = read_comparison(out).curve("train", "topk", "loss")
    assert losses_SN[0, list(steps).index(40)] == 1.25
    assert len(set(steps)) == len(steps)


def test_values_that_are_not_numbers_leave_a_gap(tmp_path):
    out = write_fake_run(tmp_path, routers=("topk",), seeds=1, steps=80)
    with (out / "records.jsonl").open("a") as file:
        file.write('{"kind": "train", "router": "topk", "seed": 0, "step": 40, "loss": NaN}\n')
    steps, losses_SN = read_comparison(out).curve("train", "topk", "loss")
    assert 40 not in steps
    assert np.isfinite(losses_SN).all()


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json.*--out"):
        read_comparison(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        read_comparison(tmp_path)
