"""When a difference between means is more than the spread over seeds explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 1 % points of Student's t by degrees of freedom; between two entries the larger one is used.
T_1PERCENT = {
    1: 63.66, 2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50, 8: 3.36, 10: 3.17, 12: 3.05, 15: 2.95,
    20: 2.85, 30: 2.75, 60: 2.66,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Mean and standard deviation (None with one seed) of ``count`` seeds."""

    mean: float
    std: float | None
    count: int


def separated(a: Sample, b: Sample, samples: Sequence[Sample]) -> bool:
    """Whether two means differ by more than chance explains; with one seed of either, nothing does.

    A two-sided t-test at the 1 % level, the standard deviation over seeds pooled over all ``samples``.

    Examples:
        >>> from monge.viz.spread import Sample, separated
        >>> near, far, single = Sample(1.40, 0.01, 3), Sample(1.80, 0.01, 3), Sample(9.0, None, 1)
        >>> separated(near, far, [near, far]), separated(near, single, [near, single])
        (True, False)
    """
    freedom = sum(sample.count - 1 for sample in samples)
    if min(a.count, b.count) < 2 or freedom < 1:
        return False
    squares = sum((sample.count - 1) * (sample.std or 0.0) ** 2 for sample in samples)
    error = math.sqrt(squares / freedom * (1 / a.count + 1 / b.count))
    critical = T_1PERCENT[max(key for key in T_1PERCENT if key <= freedom)]
    return abs(a.mean - b.mean) > critical * error
