"""The sentences claim what the figures allow: no ranking from one seed, nor within the spread of several."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from viz.fake_records import write_fake_run

from monge.viz.findings import findings, headline, separated
from monge.viz.records import Comparison, read_comparison
from monge.viz.spread import T_1PERCENT

RANKING = re.compile(r"lowest|best|wins|behind|ahead|better than")


def comparison_of(**losses: tuple[float, float, int]) -> Comparison:
    """A comparison with (mean, standard deviation, seeds) per router."""
    rows = [
        {"router": name, "val_loss_mean": mean, "val_loss_std": spread if n > 1 else None, "seeds": n}
        for name, (mean, spread, n) in losses.items()
    ]
    return Comparison({}, {}, rows)


def test_the_table_holds_students_t():
    for freedom, critical in T_1PERCENT.items():
        assert critical == pytest.approx(stats.t.ppf(0.995, freedom), abs=0.006), freedom


@given(
    gap=st.floats(0.0, 0.1),
    spread=st.floats(1e-4, 0.05),
    seeds=st.integers(2, 6),
)
def test_two_models_are_separated_as_by_a_t_test(gap, spread, seeds):
    rows = comparison_of(a=(4.0, spread, seeds), b=(4.0 + gap, spread, seeds)).rows
    p = stats.ttest_ind_from_stats(4.0, spread, seeds, 4.0 + gap, spread, seeds).pvalue
    if abs(p - 0.01) > 1e-3 and 2 * (seeds - 1) in T_1PERCENT:
        assert separated(*rows, rows) == (p < 0.01)


@given(st.lists(st.floats(1.0, 9.0), min_size=2, max_size=6))
def test_one_seed_never_ranks(losses):
    rows = {f"r{i}": (mean, 0.0, 1) for i, mean in enumerate(losses)}
    sentence = headline(comparison_of(**rows))
    assert sentence.startswith("A demonstration, no ranking.")
    assert not RANKING.search(sentence)


@given(st.floats(-0.004, 0.004), st.floats(-0.004, 0.004))
def test_a_gap_within_the_spread_is_no_ranking(b, c):
    sentence = headline(comparison_of(a=(4.0, 0.01, 3), b=(4.0 + b, 0.01, 3), c=(4.0 + c, 0.01, 3)))
    assert sentence.startswith("No ranking")
    assert not RANKING.search(sentence)


def test_a_clear_gap_is_said_and_a_tie_at_the_top_stays_a_tie():
    clear = headline(comparison_of(a=(4.30, 0.002, 3), b=(4.40, 0.002, 3)))
    assert clear.startswith("a has the lowest validation loss, 4.3000 ± 0.0020 (3 seeds)")
    assert clear.endswith("b by 0.100.")
    tie = headline(comparison_of(a=(4.301, 0.002, 3), b=(4.300, 0.002, 3), c=(4.5, 0.002, 3)))
    assert "does not separate b and a at the lowest" in tie
    assert tie.endswith("behind: c by 0.200.")


def test_a_single_seed_beside_several_ranks_nothing():
    sentence = headline(comparison_of(a=(4.3, 0.001, 3), b=(4.5, 0.0, 1)))
    assert sentence.startswith("A demonstration, no ranking.")


def test_nothing_and_a_single_model():
    assert "No run has finished" in headline(comparison_of())
    assert "no run has finished" in headline(comparison_of(a=(float("nan"), 0.0, 1))).lower()
    assert headline(comparison_of(prices=(4.3, 0.002, 2))).startswith(
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


def test_a_dense_model_ahead_is_not_hidden():
    mixed = comparison_of(dense=(4.2, 0.001, 2), topk=(4.3, 0.001, 2), ssr=(4.1, 0.001, 2))
    assert findings(mixed)[0].startswith("1 of 2 models with experts end below the dense baseline")
    worse = comparison_of(dense=(4.2, 0.001, 2), topk=(4.3, 0.001, 2), ssr=(4.4, 0.001, 2))
    assert "ends 0.100 to 0.200 nats per token above the dense baseline" in findings(worse)[0]


def test_a_gain_over_dense_from_one_seed_says_so():
    comparison = comparison_of(dense=(4.4, 0.0, 1), topk=(4.3, 0.0, 1))
    assert findings(comparison)[0].endswith("(one seed).")
    doubtful = comparison_of(dense=(4.4, 0.2, 2), topk=(4.3, 0.2, 2))
    assert findings(doubtful)[0].endswith("(within the spread over seeds).")
    partly = comparison_of(dense=(4.4, 0.01, 3), topk=(4.3, 0.01, 3), ssr=(4.39, 0.01, 3))
    assert findings(partly)[0].endswith("(not all of it beyond the spread over seeds).")
    clear = comparison_of(dense=(4.4, 0.01, 3), topk=(4.3, 0.01, 3))
    assert findings(clear)[0].endswith("equal active FLOPs.")


def test_dense_alone_has_no_findings():
    assert findings(replace(comparison_of(dense=(4.4, 0.0, 1)))) == []
