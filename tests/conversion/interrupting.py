"""An observer that interrupts a conversion where a test wants it."""

from __future__ import annotations

from monge.conversion.observer import Silent


class Stop(Exception):
    pass


class StopsAt(Silent):
    """Interrupts at the given step of the given stage."""

    def __init__(self, stage, step):
        self.wanted, self.step, self.now, self.done = stage, step, "", 0

    def stage(self, name, total):
        self.now, self.done = name, 0

    def advance(self, steps=1, note=""):
        self.done += steps
        if self.now == self.wanted and self.done >= self.step:
            raise Stop
