"""What an experiment tells while it runs. The lab prints nothing; whoever calls it may watch."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Receives the progress of `monge.lab.compare`. Steps count from 1, and go on counting when resumed."""

    def run_started(self, router: str, seed: int, steps: int, run_index: int, runs: int) -> None:
        """Run number `run_index` (from 0) of `runs` begins; it has `steps` optimizer steps in all."""

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
        """An optimizer step is done; `max_violation` is the mean over layers, None for the dense baseline."""

    def run_finished(self, record: dict[str, Any]) -> None:
        """The run is evaluated, or was before this command began; `record` is its ``eval`` record."""

    def message(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """Watches nothing."""

    def run_started(self, router: str, seed: int, steps: int, run_index: int, runs: int) -> None: ...

    def step(
        self,
        router: str,
        seed: int,
        step: int,
        steps: int,
        loss: float,
        tokens_per_s: float,
        max_violation: float | None,
    ) -> None: ...

    def run_finished(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...
