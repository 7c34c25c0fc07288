"""The clock and the candidates of `monge bench`: equal work, interleaved turns, memory that a call holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from monge.speed.candidates import THEIRS, candidates
from monge.speed.timing import interleave, peak_bytes


def test_interleave_takes_the_clock_it_is_given():
    ticks = itertools.count()
    seconds = interleave({"a": lambda: None}, repeats=3, warmup=0, clock=lambda: float(next(ticks)))
    assert seconds == {"a": 1.0}


def test_peak_counts_what_a_call_holds():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    assert peak_bytes(lambda: torch.ones(2**24)) >= 0.9 * 2**26
    assert peak_bytes(lambda: None) < 2**24


@pytest.mark.parametrize("backward", [False, True])
def test_the_candidates_beside_the_dense_ffn_do_the_same_work(backward):
    pytest.importorskip("transformers")
    runs = candidates(16, 8, 4, 2, 6, torch.float32, 32, backward=backward)
    assert set(runs) == {"dense", "monge", *THEIRS}
    results = {name: run() for name, run in runs.items() if name != "dense"}
    ours = results.pop("monge")
    for theirs in results.values():
        for a, b in zip(ours, theirs) if backward else [(ours, theirs)]:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
