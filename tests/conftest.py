"""Shared fixtures: every test starts from the same seed, and thread counts do not leak between tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import `oracles`

# The examples are the same on every machine and every run; a deadline would time the machine, not the code.
settings.register_profile(
    "monge",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("monge")


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    missing = {}
    if not torch.accelerator.is_available():
        missing["gpu"] = "needs an accelerator"
    if "MONGE_SERVED_MODEL" not in os.environ:
        missing["serving"] = "needs a model to serve and the engines: make test-serving"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
