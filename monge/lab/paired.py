"""Differences between two routers, seed by seed, and their confidence interval.

Both runs of a seed share initial weights and data order, so most of what a seed does to the loss cancels in
the difference. With n seeds the interval is ``mean ± t sd / sqrt(n)``, t of Student's distribution with n - 1
degrees of freedom: 4.30 for three seeds at 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

LEVEL = 0.95


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, float] | None:
    """``mean``, ``low`` and ``high`` of a - b over the seeds that both have; None with fewer than two.

    Args:
        a: seed -> value.
        b: seed -> value.

    Examples:
        >>> from monge.lab.paired import paired_difference
        >>> interval = paired_difference({0: 4.50, 1: 4.40, 2: 4.60}, {0: 4.45, 1: 4.34, 2: 4.54})
        >>> {name: round(value, 3) for name, value in interval.items()}
        {'mean': 0.057, 'low': 0.042, 'high': 0.071}
    """
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if len(differences) < 2:
        return None
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = t_quantile(len(differences) - 1) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that Student's distribution with ``freedom`` degrees stays within (two-sided) at ``level``.

    Examples:
        >>> from monge.lab.paired import t_quantile
        >>> round(t_quantile(2), 3), round(t_quantile(9), 3)
        (4.303, 2.262)
    """
    low, high = 0.0, math.pi / 2  # of theta = atan(t / sqrt(freedom))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(theta)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):  # cos^1, cos^3, ... or cos^0, cos^2, ..., up to freedom - 2
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
