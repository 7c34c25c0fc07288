"""Resumption: after Ctrl-C or kill -9 at any moment the same command ends with bit-identical results."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from monge.lab import CompareConfig, compare

TIMES = {"tokens_per_s", "ms_step", "ms_route", "wall_s", "peak_memory_bytes"}
STATEFUL = ("dense", "noisy_topk", "ssr", "maxscore", "prices", "lossfree", "quantile", "ssr:carry=True")


class Interrupter:
    """Presses Ctrl-C after a given number of steps."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.messages: list[str] = []

    def run_started(self, *args): ...

    def run_finished(self, record): ...

    def message(self, text):
        self.messages.append(text)

    def step(self, *args):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def _results(out: Path) -> list[dict]:
    """All records without their timings, which nothing can repeat."""
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    keys = [tuple(row.get(name) for name in ("kind", "router", "seed", "step", "layer")) for row in rows]
    assert len(set(keys)) == len(keys), "a record occurs twice"
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_interrupts_at_random_steps_change_nothing(make_config, tmp_path):
    config = make_config(routers=STATEFUL)
    compare(config, tmp_path / "whole")
    draw, interrupts, messages = random.Random(0), 0, []
    while True:
        observer = Interrupter(draw.randint(5, 18))
        try:
            compare(config, tmp_path / "broken", observer=observer)
            break
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            messages += observer.messages
    assert interrupts >= 5
    assert sum("going on after step" in text for text in messages) >= 4
    assert _results(tmp_path / "broken") == _results(tmp_path / "whole")
    assert (tmp_path / "broken" / "tokenizer.json").read_bytes() == (
        tmp_path / "whole" / "tokenizer.json"
    ).read_bytes()
    assert not (tmp_path / "broken" / "checkpoints").exists()


def test_resuming_uses_the_checkpoint(make_config, tmp_path):
    """The steps before the checkpoint are not taken again."""
    config = make_config(routers=("prices",))
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "out", observer=Interrupter(15))
    observer = Interrupter(8)  # steps 13 to 20: the last checkpoint was at 12
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "out", observer=observer)
    assert observer.messages == ["prices, seed 0: going on after step 12"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 20


def test_a_damaged_checkpoint_is_named(make_config, tmp_path):
    config = make_config(routers=("prices",))
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "out", observer=Interrupter(6))
    (path,) = (tmp_path / "out" / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"prices-0\.safetensors cannot be used .*Delete it"):
        compare(config, tmp_path / "out")
    path.unlink()
    compare(config, tmp_path / "out")


SCRIPT = """
import json, sys
from pathlib import Path
from monge.lab import CompareConfig, compare
fields = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(sys.argv[1]).items()}
compare(CompareConfig(**fields), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(make_config, tmp_path):
    config: CompareConfig = make_config(routers=("ssr", "prices"), steps=300, checkpoint_every=7)
    compare(config, tmp_path / "whole")
    out, draw, kills = tmp_path / "broken", random.Random(1), 0
    command = [sys.executable, "-c", SCRIPT, json.dumps(asdict(config)), str(out)]
    for _ in range(8):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = _size(out)
        while process.poll() is None and _size(out) == before:  # the imports, and what was done before
            time.sleep(0.01)
        if kills < 3:
            time.sleep(draw.uniform(0, 0.7))
            process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert kills >= 2
    assert _results(out) == _results(tmp_path / "whole")


def _size(out: Path) -> int:
    records = out / "records.jsonl"
    return records.stat().st_size if records.exists() else 0


def test_more_routers_and_seeds_are_added_to_what_is_there(make_config, tmp_path):
    few = make_config(routers=("topk", "noisy_topk"), seeds=1, steps=4)
    many = replace(few, preset="papers", routers=("prices", "noisy_topk", "topk"), seeds=2)
    begun = compare(few, tmp_path / "out")
    counter = Interrupter(0)
    compare(many, tmp_path / "out", observer=counter)
    assert -counter.left == 4 * (3 * 2 - 2)  # steps: of the runs that were missing
    compare(many, tmp_path / "whole")
    by_run = [
        sorted(_results(tmp_path / name), key=lambda row: json.dumps(row, sort_keys=True))
        for name in ("out", "whole")
    ]
    assert by_run[0] == by_run[1]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["config"]["routers"], stored["config"]["seeds"]) == (list(many.routers), 2)
    again = compare(few, tmp_path / "out")  # fewer: what was asked for, nothing is lost
    assert [row["val_loss_mean"] for row in again] == [row["val_loss_mean"] for row in begun]
    with pytest.raises(ValueError, match=r"other settings: steps \(was 4, now 5\)"):
        compare(replace(many, steps=5), tmp_path / "out")
