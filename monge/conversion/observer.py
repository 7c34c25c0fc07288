"""What a conversion tells while it runs; the command line draws it, everyone else may ignore it."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Is told of stages one after the other, and of steps within the current one."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """So many more steps of the stage are done; ``note`` is a figure worth showing beside the bar."""

    def message(self, text: str) -> None:
        """Anything else worth a line."""


class Silent:
    """An observer that shows nothing."""

    def stage(self, name: str, total: int) -> None:
        """Nothing."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""
