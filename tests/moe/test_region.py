"""Compiled functions on torch's threads: all at once, without the interpreter lock, errors, forks."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from monge.moe.compute import PATHS
from monge.moe.compute.gemv_kernels import _add_to
from monge.moe.compute.region import call_on_threads, nap
from monge.moe.cpu_kernels import compiled
from monge.ot.threads import openmp_region

FORKED = """
import os, signal, torch
from monge.moe import Experts

torch.set_num_threads(2)
torch.manual_seed(0)
experts, x = Experts(64, 64, 8), torch.randn(16, 64)
gates, indices = torch.rand(16, 8).topk(2)
with torch.no_grad():
    before = experts(x, indices, gates)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # torch's threads are gone: who waits for them waits for ever
        os._exit(0 if torch.equal(experts(x, indices, gates), before) else 1)
assert os.waitpid(child, 0)[1] == 0
"""

pytestmark = pytest.mark.skipif(not openmp_region(), reason="torch's threads are out of reach")


@compiled
def _meet(counters, threads):
    """Wait until as many threads are in here."""
    _add_to(counters, 0, 1)
    while _add_to(counters, 0, 0) < threads:
        nap()
    _add_to(counters, 1, 1)


@compiled
def _fail(counters, threads):
    if _add_to(counters, 0, 1) == threads - 1:
        raise ValueError


@compiled
def _run(region, threads, arguments):
    return call_on_threads(region, threads, _meet, arguments)


@compiled
def _run_to_fail(region, threads, arguments):
    return call_on_threads(region, threads, _fail, arguments)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_calls_once_and_all_at_the_same_time(threads):
    counters = np.zeros(2, np.int64)
    for call in range(1, 4):  # on one thread they would wait for ever
        counters[0] = 0
        assert _run(openmp_region(), threads, (counters, threads))
        assert counters.tolist() == [threads, call * threads]


def test_an_exception_is_told():
    counters = np.zeros(1, np.int64)
    assert not _run_to_fail(openmp_region(), 2, (counters, 2))
    assert counters[0] == 2
    assert _run_to_fail(openmp_region(), 2, (counters, 0))


def test_running_out_of_memory_is_an_error(monkeypatch):
    module = sys.modules["monge.moe.compute.gemv"]
    monkeypatch.setattr(module, "ALONE", 0)
    monkeypatch.setattr(module.kernels, "run_on_threads", lambda *_: False)
    torch.set_num_threads(2)
    hidden, weights = torch.randn(3, 8), torch.ones(3, 1)
    proj_in, proj_out = torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    with pytest.raises(MemoryError, match="fewer tokens"):
        PATHS["gemv"](hidden, torch.zeros(3, 1, dtype=torch.int64), weights, proj_in, proj_out, "swiglu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork_the_experts_go_on():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=120)
