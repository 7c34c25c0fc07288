"""The benchmark of the paper's central claim runs from end to end, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.dot_claim", "--quick", "--seeds", "1", "--threads", "1"]
    return subprocess.run([*command, "--out", str(out), *options], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_claim_is_measured_for_every_method_and_resumed(tmp_path):
    out = tmp_path / "claim.json"
    first = run(out)
    assert first.returncode == 0, first.stderr
    stored = json.loads(out.read_text())
    cells = stored["cells"]
    rows = ["dot", "dot from ot_lloyd", "ot_lloyd", "random", "weight_kmeans", "activation_kmeans", "cmoe"]
    for method in [*rows, "gradient", "static"]:
        for active in ("25%", "50%"):
            assert cells[f"{method} / {active} / trained / seed 0"]["ratio"] > 0
            assert (f"{method} / {active} / frozen / seed 0" in cells) == (method != "static")
        trials = [key for key in cells if key.startswith(f"search / {method} /")]
        assert len(trials) == (3 if method == "static" else 6)
    assert first.stdout.count("than the best baseline") == 4  # frozen and trained, at either share

    missing = cells.pop("dot / 25% / frozen / seed 0")
    out.write_text(json.dumps(stored))
    second = run(out)
    assert second.returncode == 0, second.stderr
    again = json.loads(out.read_text())["cells"]["dot / 25% / frozen / seed 0"]
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in missing.items() if k != "seconds"
    }
    assert second.stdout.count(" ratio ") == 1  # nothing else was computed again

    other = run(out, "--steps", "3")
    assert other.returncode == 1
    assert "other settings" in other.stderr
