"""Lines over training steps, as the figures of every report draw them.

Shapes: S seeds, N recorded steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from monge.viz.style import colour, dashes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # series: (N,) steps and (S, N) values


def draw_lines(ax: Axes, curves: Curves, marker: str | None = None) -> None:
    """Every series' mean and, where there are several seeds, one standard deviation to both sides."""
    from matplotlib.ticker import MaxNLocator

    for name, (steps, values_SN) in curves.items():
        mean = values_SN.mean(0)
        ax.plot(
            steps,
            mean,
            color=colour(name),
            linestyle=dashes(name),
            linewidth=1.5,
            marker=marker,
            markersize=2.6,
        )
        if len(values_SN) > 1:
            spread = values_SN.std(0, ddof=1)
            ax.fill_between(steps, mean - spread, mean + spread, color=colour(name), alpha=0.13, linewidth=0)
    last = max(steps[-1] for steps, _ in curves.values())
    ax.set_xlim(min(steps[0] for steps, _ in curves.values()), last)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def smooth(values_SN: np.ndarray) -> np.ndarray:
    """Centred mean over about a tenth of the points; at both ends, over those of them that exist."""
    points = values_SN.shape[1]
    half = (points + 10) // 20
    sums = np.concatenate([np.zeros((len(values_SN), 1)), values_SN.cumsum(1)], axis=1)
    at = np.arange(points)
    first, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, points)
    return (sums[:, stop] - sums[:, first]) / (stop - first)


def frame(curves: Curves) -> tuple[float, float]:
    """Limits that leave out the fall of the first steps, which would flatten everything that follows."""
    low = min(values.min() for _, values in curves.values())
    high = max(values[:, cut_points(curves) :].max() for _, values in curves.values())
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def cut_points(curves: Curves) -> int:
    """How many of the first points the frame need not hold."""
    return min(len(steps) for steps, _ in curves.values()) // 8


def bands(curves: Curves) -> str:
    """What the caption says of them."""
    several = any(len(values_SN) > 1 for _, values_SN in curves.values())
    return "bands: one standard deviation over seeds" if several else "one seed, hence no band"
