"""The sentences claim what the figures allow: no ranking from one seed, nor within the spread of several."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from viz.fake_records import write_fake_run

from monge.lab.paired import paired_difference
from monge.viz.findings import findings, headline, separated
from monge.viz.records import Comparison, read_comparison
from monge.viz.spread import T_1PERCENT

RANKING = re.compile(r"lowest|best|wins|behind|ahead|better than")
NOISE = (-0.001, 0.0015, -0.0005)


def comparison_of(**losses: list[float]) -> Comparison:
    """A finished comparison with the losses of every router by seed."""
    rows = [
        {
            "router": name.replace("_", ":", 1),
            "val_loss_mean": statistics.fmean(values),
            "val_loss_std": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
            "minus": {
                other: paired_difference(dict(enumerate(values)), dict(enumerate(theirs)))
                for other, theirs in losses.items()
                if other != name
            },
        }
        for name, values in losses.items()
    ]
    return Comparison({}, {}, rows)


def near(mean: float, noise: tuple[float, ...] = NOISE) -> list[float]:
    """Three seeds around a mean; the noise adds up to zero."""
    return [mean + part for part in noise]


def test_the_table_of_conversions_holds_students_t():
    for freedom, critical in T_1PERCENT.items():
        assert critical == pytest.approx(stats.t.ppf(0.995, freedom), abs=0.006), freedom


@given(st.lists(st.tuples(st.floats(4.0, 4.1), st.floats(4.0, 4.1)), min_size=2, max_size=6))
def test_two_models_are_separated_as_by_a_paired_t_test(pairs):
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    differences = [x - y for x, y in pairs]
    assume(statistics.stdev(differences) > 1e-9)
    p = stats.ttest_rel(a, b).pvalue
    assume(abs(p - 0.05) > 1e-6)
    rows = comparison_of(a=a, b=b).rows
    assert separated(*rows) == separated(*reversed(rows)) == (p < 0.05)


def test_a_seed_that_moves_both_alike_does_not_hide_their_difference():
    seeds = (0.0, 0.3, -0.2)  # far more than the gap
    rows = comparison_of(
        a=[4.0 + s for s in seeds], b=[4.01 + s + n for s, n in zip(seeds, NOISE, strict=True)]
    ).rows
    assert separated(*rows)


@given(st.lists(st.floats(1.0, 9.0), min_size=2, max_size=6))
def test_one_seed_never_ranks(losses):
    sentence = headline(comparison_of(**{f"r{i}": [mean] for i, mean in enumerate(losses)}))
    assert sentence.startswith("A demonstration, no ranking.")
    assert not RANKING.search(sentence)


@given(st.floats(-0.0008, 0.0008), st.floats(-0.0008, 0.0008))
def test_a_gap_within_the_interval_is_no_ranking(b, c):
    shuffled = (NOISE[1:] + NOISE[:1], NOISE[2:] + NOISE[:2])
    sentence = headline(
        comparison_of(a=near(4.0), b=near(4.0 + b, shuffled[0]), c=near(4.0 + c, shuffled[1]))
    )
    assert sentence.startswith("No ranking")
    assert not RANKING.search(sentence)


def test_a_clear_gap_is_said_and_a_tie_at_the_top_stays_a_tie():
    clear = headline(comparison_of(a=near(4.30), b=near(4.40)))
    assert clear.startswith("a has the lowest validation loss, 4.3000 ± 0.0013 (3 seeds) nats per token")
    assert clear.endswith("b by 0.100.")
    tie = headline(comparison_of(a=near(4.3001, NOISE[1:] + NOISE[:1]), b=near(4.300), c=near(4.5)))
    assert "do not separate b and a at the lowest" in tie
    assert tie.endswith("behind: c by 0.200.")


def test_a_single_seed_beside_several_ranks_nothing():
    sentence = headline(comparison_of(a=near(4.3), b=[4.5]))
    assert sentence.startswith("A demonstration, no ranking.")


def test_without_paired_differences_nothing_is_ranked():
    comparison = comparison_of(a=near(4.3), b=near(4.5))
    for row in comparison.rows:
        del row["minus"]
    assert headline(comparison).startswith("No ranking yet: the 2 models with finished runs end between 4.3")
    assert not RANKING.search(headline(comparison))


def test_the_reference_is_met_by_name_with_intervals():
    comparison = comparison_of(
        topk=near(4.3), prices=near(4.25, (0, 0, 0)), ssr_p=near(4.4), hash=near(4.3002, NOISE[::-1])
    )
    for row in comparison.rows:
        row["router"] = {"ssr:p": "ssr:p=1"}.get(row["router"], row["router"])
    comparison = replace(
        comparison, records={"eval": [{"router": row["router"], "seed": 0} for row in comparison.rows]}
    )
    sentence = findings(comparison)[0]
    assert sentence.startswith("Against topk, in brackets the 95 % interval: below it is prices (-0.050 [")
    assert "above it is ssr p=1 (+0.100 [+0.100, +0.100])" in sentence
    assert sentence.endswith("not separated from it: hash.")


def test_a_synthetic_start_is_said_first():
    comparison = replace(
        comparison_of(topk=near(4.3), prices=near(4.2)),
        config={"config": {"router_bias": 3.0, "experts": 16}},
    )
    assert headline(comparison).startswith(
        "Synthetic: a learnable router bias starts at +3 on 4 of the 16 experts"
    )
    assert "prices has the lowest validation loss" in headline(comparison)


def test_what_is_left_of_a_bias_and_its_gradient_are_told():
    comparison = comparison_of(topk=near(4.3), ssr=near(4.4))
    for row, gap, gradient in zip(comparison.rows, (2.5, 3.0), (0.01, 4e-11), strict=True):
        row |= {"bias_gap": gap, "bias_gradient": gradient}
    told = replace(comparison, config={"config": {"router_bias": 3.0, "experts": 4}})
    (sentence,) = (s for s in findings(told) if s.startswith("Of the bias"))
    assert (
        "+2.5000 is left with topk and +3.0000 with ssr; the weakest gradient to it has ssr (4e-11)"
        in sentence
    )
    assert not any(s.startswith("Of the bias") for s in findings(comparison))


def test_nothing_and_a_single_model():
    assert "No run has finished" in headline(comparison_of())
    assert "no run has finished" in headline(comparison_of(a=[float("nan")])).lower()
    assert headline(comparison_of(prices=[4.299, 4.301])).startswith(
        "prices ends at a validation loss of 4.3000"
    )


def test_the_questions_are_answered_from_the_records(tmp_path):
    sentences = " ".join(findings(read_comparison(write_fake_run(tmp_path))))
    assert re.search(
        r"Every model with experts ends 0\.\d+ to 0\.\d+ nats per token below the dense", sentences
    )
    assert "1.17 times its share with prices and 2.52 times its share with ssr" in sentences
    assert "in training maxscore is perfectly balanced" in sentences
    assert "topk and ssr leave experts without a token" in sentences
    assert "with ssr (5.5 %) and maxscore (5.8 %); the other routers leak nothing" in sentences
    assert "at most 14.5 % of a training step, all layers together (maxscore, 6.10 ms a layer)" in sentences


def about_dense(comparison: Comparison) -> str:
    return next(s for s in findings(comparison) if "the dense baseline" in s)


def test_a_dense_model_ahead_is_not_hidden():
    mixed = comparison_of(dense=near(4.2), topk=near(4.3), ssr=near(4.1))
    assert about_dense(mixed).startswith("1 of 2 models with experts end below the dense baseline")
    worse = comparison_of(dense=near(4.2), topk=near(4.3), ssr=near(4.4))
    assert "ends 0.100 to 0.200 nats per token above the dense baseline" in about_dense(worse)


def test_a_gain_over_dense_from_one_seed_says_so():
    assert about_dense(comparison_of(dense=[4.4], topk=[4.3])).endswith("(one seed).")
    doubtful = comparison_of(dense=[4.4, 4.6], topk=[4.2, 4.7])
    assert about_dense(doubtful).endswith("(no interval excludes zero).")
    partly = comparison_of(dense=near(4.4), topk=near(4.3), ssr=[4.1, 4.6, 4.4])
    assert about_dense(partly).endswith("(not every interval excludes zero).")
    clear = comparison_of(dense=near(4.4), topk=near(4.3))
    assert about_dense(clear).endswith("equal active FLOPs.")


def test_dense_alone_has_no_findings():
    assert findings(comparison_of(dense=[4.4])) == []
