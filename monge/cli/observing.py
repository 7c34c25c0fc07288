"""Live progress of stages that follow each other: a bar on a terminal, plain lines everywhere else.

Both follow `monge.conversion.observer.Observer` and are context managers; `make_stage_progress` chooses.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from monge.viz.numbers import duration

SECONDS_BETWEEN_LINES = 30.0


class StageLines:
    """One line when a stage begins, and one every half minute of it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.name, self.total, self.done = "", 0, 0
        self.began = self.told = time.monotonic()

    def __enter__(self) -> StageLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""
        self.name, self.total, self.done = name, total, 0
        self.began = self.told = time.monotonic()
        self.message(f"{name}: {total} steps")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many more steps of the stage are done."""
        self.done += steps
        now = time.monotonic()
        if now - self.told >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.told = now
            self.message(f"    {self.done}/{self.total}{self.state(note)}")

    def message(self, text: str) -> None:
        """Anything else worth a line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def state(self, note: str) -> str:
        """The note and the time left in this stage, from its own pace."""
        spent = time.monotonic() - self.began
        left = spent / self.done * max(self.total - self.done, 0) if self.done else None
        parts = [note] if note else []
        parts += [f"{duration(left)} left"] if left is not None else []
        return "".join(f", {part}" for part in parts)


class StageBar(StageLines):
    """A bar of the current stage, with its time left and note; finished stages stay as lines above."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        # A slow refresh: the computation shares the processor.
        self.bar = Progress(
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> StageBar:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self.bar.__exit__(kind, error, trace)

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""
        self._finish()
        self.name, self.total, self.done = name, total, 0
        self.began = time.monotonic()
        self.bar.update(self.task, completed=0, total=total, description=name)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many more steps of the stage are done."""
        self.done += steps
        self.bar.update(self.task, completed=self.done, description=f"{self.name}{self.state(note)}")

    def _finish(self) -> None:
        if self.name:
            self.console.print(f"[green]done[/] {self.name}, {duration(time.monotonic() - self.began)}")


def make_stage_progress(console: Console) -> StageLines:
    """A bar where the console can redraw itself, else lines."""
    return StageBar(console) if console.is_terminal and not console.is_dumb_terminal else StageLines(console)
