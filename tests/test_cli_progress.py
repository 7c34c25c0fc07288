"""Progress tells the truth about the time left, and stays plain where nothing can redraw itself."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from monge.cli import progress as module
from monge.cli.progress import Clock, LiveProgress, PlainProgress, make_progress
from monge.cli.terminal import print_results

RECORD = {"router": "topk", "seed": 1, "val_loss": 4.25, "max_violation": 0.5, "wall_s": 75.0}


@pytest.fixture
def time(monkeypatch):
    class Time:
        now = 0.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Time.now)
    return Time


def console(terminal: bool, width: int = 100) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, legacy_windows=False, color_system=None
    )


def play(observer, steps: int = 50, runs: int = 2) -> str:
    with observer:
        for index in range(runs):
            observer.run_started("topk", index, steps, index, runs)
            for step in range(1, steps + 1):
                observer.step("topk", index, step, steps, 5.0, 12_345.6, 0.25)
            observer.run_finished(RECORD)
        observer.message("over [1] and out")
    return observer.console.file.getvalue()


def test_time_left_follows_the_pace(time):
    clock = Clock()
    assert clock.left(0, 1, 10, 2) is None
    for step in range(2, 6):
        time.now += 2.0
        left = clock.left(0, step, 10, 2)
    assert left == pytest.approx(2.0 * 15)


def test_steps_before_a_resumption_do_not_count(time):
    clock = Clock()
    clock.left(3, 151, 300, 4)  # three runs and 150 steps were done by an earlier command
    time.now += 3.0
    assert clock.left(3, 152, 300, 4) == pytest.approx(3.0 * 148)
    later = Clock()
    later.left(0, 300, 300, 4)
    time.now += 5.0
    assert later.left(2, 101, 300, 4) == pytest.approx(5.0 * 499)  # the run between had been done before


def test_lines_are_few_and_plain():
    text = play(PlainProgress(console(False)))
    lines = text.splitlines()
    assert len(lines) == 2 * (1 + 4 + 1) + 1
    assert lines[0] == "[1/2] topk, seed 0: 50 steps"
    assert lines[1].startswith("    topk, seed 0: step 10/50, loss 5.000, 12,346 tokens/s, imbalance 0.25")
    assert lines[5] == "    topk, seed 1: val. loss 4.2500, imbalance 0.50, 1 min 15 s"
    assert lines[-1] == "over [1] and out"
    assert "\x1b" not in text


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_short_run_prints_each_step_at_most_once(steps):
    lines = play(PlainProgress(console(False)), steps=steps, runs=1).splitlines()
    assert len(lines) == len(set(lines)) <= 2 + steps


def test_a_dense_model_has_no_imbalance():
    observer = PlainProgress(console(False))
    observer.run_started("dense", 0, 5, 0, 1)
    observer.step("dense", 0, 1, 5, 5.0, 100.0, None)
    observer.run_finished(RECORD | {"max_violation": None})
    assert "imbalance" not in observer.console.file.getvalue()


def test_the_terminal_gets_a_bar_and_keeps_the_finished_runs():
    observer = LiveProgress(console(True))
    text = play(observer)
    assert "run 2 of 2" in text
    assert text.count("done topk, seed 1: val. loss 4.2500") == 2
    assert "over [1] and out" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_the_cursor_is_back_after_an_error(monkeypatch):
    observer = LiveProgress(console(True))
    monkeypatch.setattr(observer, "run_finished", lambda record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play(observer)
    text = observer.console.file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_console_decides():
    assert type(make_progress(console(True))) is LiveProgress
    assert type(make_progress(console(False))) is PlainProgress


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_table_fits_and_never_breaks_a_number(width):
    row = {
        "router": "maxscore", "val_loss_mean": 4.3023, "val_loss_std": 0.0016, "val_loss_own_mean": 4.2963,
        "train_max_violation": 0.0, "max_violation": 0.38, "dead_experts": 0, "leak": 0.058, "ot_steps": 20,
        "ms_step": 84.0, "ms_route": 6.1,
    }  # fmt: skip
    target = console(False, width)
    print_results(target, [row], "One sentence.")
    lines = target.file.getvalue().splitlines()
    line = next(line for line in lines if "maxscore" in line)
    assert "4.3023 ± 0.0016" in line
    assert "5.8 %" in line
    assert max(len(line) for line in lines) <= width
    assert ("84.0" in line) == (width >= 80)
    assert ("4.2963" in line) == (width >= 100)
