"""Resident memory: the peak of a stretch, and what is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from monge.workspace.memory import peak_bytes, reset_peak

# blocks too small to be mapped one by one, every tenth of which stays: the gaps are kept by the C library
GAPS = """
import ctypes, re
from pathlib import Path
from monge.workspace.memory import give_back

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

hasattr(ctypes.CDLL(None), "malloc_trim") or exit(77)
before = resident()
blocks = [bytearray(b"x" * 60_000) for _ in range(2_000)]
blocks = [block for index, block in enumerate(blocks) if index % 10 == 0]
freed = resident() - before
give_back()
print(freed, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this C library has no malloc_trim")
    assert done.returncode == 0, done.stderr
    kept, after = map(int, done.stdout.split())
    assert kept > 90e6  # without it nearly all of the 120 MB
    assert after < 30e6


@pytest.mark.skipif(sys.platform != "linux", reason="the resident peak of a stretch is Linux's")
def test_a_peak_is_that_of_its_stretch():
    # blocks above 32 MB, the largest that glibc takes from its heap, where freed memory may lie ready
    large = torch.ones(30_000_000)
    del large
    assert reset_peak("cpu")
    before = peak_bytes("cpu") or 0
    large = torch.ones(20_000_000)
    assert 70e6 < (peak_bytes("cpu") or 0) - before < 110e6
    assert large.nbytes == 80_000_000
