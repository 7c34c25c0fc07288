"""The command as a user runs it, in a process of its own, on real files: finish, interrupt, go on, fail."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = shlex.split(
    "--layers 1 --width 16 --heads 2 --context 16 --experts 4 --top-k 2 --expert-width 8 --vocab 300 "
    "--val-tokens 256 --batch 2 --warmup 2 --threads 1 --log-every 2 --load-every 2 --eval-every 4 "
    "--checkpoint-every 10 --seeds 1"
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = shlex.split(
        "the mass of the sand that is moved must fill the ditch and nothing of it may be lost"
    )
    for i in range(12):
        lines = [" ".join(words[(i * j + k) % len(words)] for k in range(9)) for j in range(200)]
        (folder / f"{i:02d}.txt").write_text(".\n".join(lines))
    return folder


def command(text: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "monge", "compare", "--text", f"{text}/*.txt", "--out", str(out), *TINY, *more
    ]  # fmt: skip


def test_a_comparison_from_start_to_report(text, tmp_path):
    out = tmp_path / "out"
    words = command(text, out, "--routers", "dense", "topk", "prices", "--steps", "12")
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "[3/3] prices, seed 0: 12 steps" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert "\x1b" not in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert [row["router"] for row in summary] == ["dense", "topk", "prices"]
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "records.jsonl", "report.html", "losses.png", "loads.svg"} <= names
    report = (out / "report.html").read_text()
    assert "A demonstration, no ranking." in report
    for row in summary:
        assert f"{row['val_loss_mean']:.4f}" in report
    # Finished, so the same command trains nothing, and draws the same again.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "step" not in again.stdout.replace("12 steps", "").replace("ms step", "").split("router")[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def _heed_interrupts() -> None:
    """A process started in the background inherits an ignored SIGINT; one at a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(text, tmp_path):
    words = command(text, tmp_path / "out", "--routers", "prices", "--steps", "20000")
    for expected in ("[1/1] prices", "going on after step"):
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
        )
        try:
            records = tmp_path / "out" / "records.jsonl"
            known = records.stat().st_size if records.exists() else 0
            deadline = time.monotonic() + 240
            while not (records.exists() and records.stat().st_size > known + 20_000):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 1
        assert expected in output
        assert errors.strip().splitlines()[-1] == (
            "monge compare: interrupted. The same command goes on from the last checkpoint."
        )
        assert "Traceback" not in errors
        assert not list((tmp_path / "out").glob("**/*.tmp"))
        lines = records.read_text().splitlines()
        assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize(
    ("out", "more", "status", "said"),
    [
        ("file/out", [], 1, "file"),
        ("out", ["--text", "{tmp}/none/*.txt"], 2, "none/*.txt"),
    ],
)
def test_a_failure_is_one_message_and_a_status(text, tmp_path, out, more, status, said):
    (tmp_path / "file").write_text("not a folder")
    words = command(text, tmp_path / out, "--steps", "2", *(word.format(tmp=tmp_path) for word in more))
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
