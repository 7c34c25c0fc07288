"""The rule by which engines are compared: equal tokens up to a tie, nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from agreement import TIE, agreement, agreements


def rows(*margins: float) -> torch.Tensor:
    """Logits of three tokens: the best is 0, then 1 by the margin, then 2, far below."""
    return torch.tensor([[margin, 0.0, -9.0] for margin in margins])


def test_equal_tokens_agree_to_the_end():
    found = agreement(rows(1, 0.01, 1), [0, 0, 0])
    assert (found.length, found.margin, found.holds) == (3, None, True)
    assert agreement(torch.zeros(0, 3), []).holds


@pytest.mark.parametrize(("margin", "holds"), [(0.04, True), (0.06, False), (2.0, False)])
def test_they_may_part_only_at_a_tie(margin, holds):
    found = agreement(rows(1, margin, 1, 1), [0, 1, 1, 1])  # after it they may write what they like
    assert found.length == 1
    assert found.margin == pytest.approx(margin)
    assert found.holds is holds


def test_a_tie_passed_together_excuses_nothing_later():
    assert not agreement(rows(TIE / 2, 1), [0, 1]).holds


def test_a_missing_row_is_an_error():
    with pytest.raises(ValueError, match="2 tokens, but logits for 3"):
        agreement(rows(1, 1, 1), [0, 0])


def test_each_token_is_held_against_the_logits_before_it():
    """A model whose likeliest next token is the last one plus one."""

    def count_up(input_ids):
        return SimpleNamespace(logits=torch.nn.functional.one_hot((input_ids + 1) % 7, 7).float())

    right = {"prompt": [1, 2], "tokens": [3, 4, 5]}
    late = {"prompt": [1, 2], "tokens": [3, 4, 4]}
    assert [found.length for found in agreements(count_up, [right, late])] == [3, 2]
    assert [found.holds for found in agreements(count_up, [right, late])] == [True, False]
