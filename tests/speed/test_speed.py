"""The clock and the candidates of `monge bench`: equal work, interleaved turns, memory that a call holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from monge.speed import measure_experts
from monge.speed.candidates import THEIRS, candidates
from monge.speed.config import SpeedConfig
from monge.speed.measuring import cases
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


@pytest.mark.gpu
def test_an_accelerator_is_timed_by_its_own_clock_and_memory():
    pytest.importorskip("transformers")
    device = torch.accelerator.current_accelerator().type
    config = SpeedConfig(
        dim=64, hidden=32, experts=8, active=(2,), phases=("decode", "prefill"), repeats=2, device=device,
        layers=("MoE(512, 1024, 16, 2)",),
    )  # fmt: skip
    for case in cases(config):
        row = measure_experts(config, case)
        assert all(ms > 0 for ms in row["ms"].values())
        if case["kind"] == "training":  # the gradients alone are as large as the weights
            weights = 16 * 3 * 512 * 1024 * (4 if case["dtype"] == "float32" else 2)
            assert row["peak_bytes"]["monge"] > weights


def test_the_time_of_a_thread_is_not_that_of_an_accelerator():
    with pytest.raises(ValueError, match="cpu_time"):
        SpeedConfig(cpu_time=True, device="cuda")
