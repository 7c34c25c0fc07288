"""Live progress of a comparison: a bar on a terminal, plain lines everywhere else.

Both observers follow `monge.lab.compare` and are context managers; `make_progress` chooses.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from monge.viz.numbers import duration, loss, ratio


class Clock:
    """The time left, from the pace of the steps taken here; those before a resumption do not count."""

    def __init__(self) -> None:
        self._start = 0.0
        self._last: tuple[int, int] | None = None
        self._done = 0

    def left(self, run_index: int, step: int, steps: int, runs: int) -> float | None:
        """Seconds left after ``step`` of the run with index ``run_index``; None before the second step."""
        if self._last is None:
            self._start = time.monotonic()
        else:
            self._done += step - self._last[1] if self._last[0] == run_index else 1
        self._last = run_index, step
        if not self._done:
            return None
        return (time.monotonic() - self._start) / self._done * ((runs - run_index) * steps - step)


class PlainProgress:
    """One line when a run starts and ends, and one every fifth of it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.clock = Clock()
        self.run_index, self.runs = 0, 1

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def run_started(self, router: str, seed: int, steps: int, run_index: int, runs: int) -> None:
        """A run of ``steps`` steps begins or goes on; ``run_index`` counts from 0."""
        self.run_index, self.runs = run_index, runs
        self.message(f"[{run_index + 1}/{runs}] {router}, seed {seed}: {steps} steps")

    def step(
        self,
        router: str,
        seed: int,
        step: int,
        steps: int,
        loss: float,
        tokens_per_s: float,
        max_violation: float | None,
    ) -> None:
        """After an optimizer step."""
        left = self.clock.left(self.run_index, step, steps, self.runs)
        if step * 5 // steps > (step - 1) * 5 // steps and step < steps:
            state = _state(router, seed, step, steps, loss, tokens_per_s, max_violation)
            self.message(f"    {state}{'' if left is None else f', {duration(left)} left'}")

    def run_finished(self, record: dict[str, Any]) -> None:
        """After the final evaluation of a run."""
        self.message(f"    {_result(record)}")

    def message(self, text: str) -> None:
        """Anything else worth a line."""
        self.console.print(text, soft_wrap=True, markup=False)


class LiveProgress(PlainProgress):
    """A bar over all runs with the time left, the state of the current run under it, finished runs above."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bar = Progress(
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
        )
        self.task = self.bar.add_task("", total=None)
        self.state = Text("preparing the text", style="dim", no_wrap=True, overflow="ellipsis")
        # A slow refresh: the training loop shares the processor.
        self.live = Live(Group(self.bar, self.state), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)

    def run_started(self, router: str, seed: int, steps: int, run_index: int, runs: int) -> None:
        """A run of ``steps`` steps begins or goes on; ``run_index`` counts from 0."""
        self.run_index, self.runs = run_index, runs
        self._place(run_index * steps, runs * steps, None)
        self.state.plain = f"{router}, seed {seed}"

    def step(
        self,
        router: str,
        seed: int,
        step: int,
        steps: int,
        loss: float,
        tokens_per_s: float,
        max_violation: float | None,
    ) -> None:
        """After an optimizer step."""
        left = self.clock.left(self.run_index, step, steps, self.runs)
        self._place(self.run_index * steps + step, self.runs * steps, left)
        self.state.plain = _state(router, seed, step, steps, loss, tokens_per_s, max_violation)

    def run_finished(self, record: dict[str, Any]) -> None:
        """After the final evaluation of a run."""
        self.console.print(Text.assemble(("done ", "green"), _result(record)))

    def _place(self, done: int, total: int, left: float | None) -> None:
        remaining = "" if left is None else f", {duration(left)} left"
        description = f"run {self.run_index + 1} of {self.runs}{remaining}"
        self.bar.update(self.task, completed=done, total=total, description=description)


def make_progress(console: Console) -> PlainProgress:
    """A bar where the console can redraw itself, else lines."""
    return (
        LiveProgress(console)
        if console.is_terminal and not console.is_dumb_terminal
        else PlainProgress(console)
    )


def _state(
    router: str,
    seed: int,
    step: int,
    steps: int,
    now: float,
    tokens_per_s: float,
    max_violation: float | None,
) -> str:
    parts = [
        f"{router}, seed {seed}: step {step}/{steps}",
        f"loss {now:.3f}",
        f"{tokens_per_s:,.0f} tokens/s",
    ]
    return ", ".join(parts + ([] if max_violation is None else [f"imbalance {ratio(max_violation)}"]))


def _result(record: dict[str, Any]) -> str:
    parts = [f"{record['router']}, seed {record['seed']}: val. loss {loss(record['val_loss'])}"]
    if record.get("max_violation") is not None:
        parts.append(f"imbalance {ratio(record['max_violation'])}")
    return ", ".join(parts + ([duration(record["wall_s"])] if record.get("wall_s") is not None else []))
