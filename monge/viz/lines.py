"""Lines over training steps, as the figures of every report draw them.

Shapes: S seeds, N recorded steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from monge.viz.names import label, patterns
from monge.viz.style import THEME, colour, dashes, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # series: (N,) steps and (S, N) values


def draw_lines(
    ax: Axes, curves: Curves, marker: str | None = None, *, among: Iterable[str] | None = None
) -> None:
    """Every series' mean and, where there are several seeds, one standard deviation to both sides.

    ``among``: all series of the figure, which decide the dashes of each; the curves' own when None.
    """
    from matplotlib.ticker import MaxNLocator

    pattern = patterns(curves if among is None else among)
    for name, (steps, values_SN) in curves.items():
        mean = values_SN.mean(0)
        ax.plot(
            steps,
            mean,
            color=colour(name),
            linestyle=pattern[name] or dashes(name),
            label=label(name),
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


def name_lines(
    figure: Figure, axes: list[tuple[Axes, list[tuple[float, str]]]], *, points_high: float, wide: bool
) -> None:
    """Name the lines: each at its end, or, where the names are many or long, all in a legend below.

    Args:
        figure: of the axes.
        axes: each with (value at the end of the line, series) of its lines.
        points_high: height of the axes in points.
        wide: the layout.
    """
    series = list(dict.fromkeys(name for _, ends in axes for _, name in ends))
    if not needs_legend(series):
        for ax, ends in axes:
            label_ends(ax, ends, points_high=points_high)
        return
    handles = {text: h for ax, _ in axes for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    texts = [label(name) for name in series if label(name) in handles]
    legend = figure.legend(
        [handles[text] for text in texts],
        texts,
        loc="outside lower left",
        ncols=legend_columns(series, wide),
        fontsize=8,
        frameon=False,
        handlelength=4,
        labelcolor=THEME["ink"][0],
        columnspacing=1.2,
    )
    legend.set_in_layout(True)


def needs_legend(series: list[str]) -> bool:
    """Whether names at the ends of the lines would not fit."""
    return len(series) > 9 or any(len(label(name)) > 13 for name in series)


def legend_columns(series: list[str], wide: bool) -> int:
    """As many as the longest name leaves room for."""
    longest = max(len(label(name)) for name in series)
    return max(1, min(4, (110 if wide else 52) // (longest + 10)))


def legend_inches(series: list[str], wide: bool) -> float:
    """Height that the legend takes below the axes; none where there is none."""
    if not needs_legend(series):
        return 0.0
    return 0.15 + 0.17 * -(-len(series) // legend_columns(series, wide))


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
