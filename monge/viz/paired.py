"""The figure of differences: every router less the reference, seed by seed, with the interval around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from monge.viz.columns import Row
from monge.viz.names import label, rows_of, wrapped
from monge.viz.records import Comparison
from monge.viz.style import THEME, Drawing, colour, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.29  # inches of a row with a name of one line


def draw_differences(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """Mean difference of the validation loss (and accuracy) to the reference, and its 95 % interval."""
    reference = comparison.reference
    rows = [row for row in comparison.rows if (row.get("minus") or {}).get(reference)]
    if reference is None or not rows:
        return None
    fields = ["minus", *(["accuracy_minus"] if rows[0].get("accuracy_minus") else [])]
    names = [wrapped(row["router"], 34 if wide else 15) for row in rows]
    places, total = rows_of(names)
    height = 0.75 + ROW * total
    across = wide or len(fields) == 1
    figure = new_figure(7.6 if wide else 3.6, height if across else 2 * height)
    grid = list(figure.subplots(*((1, len(fields)) if across else (len(fields), 1)), squeeze=False).flat)
    clipped = False
    for ax, field in zip(grid, fields, strict=True):
        scale = 100 if field == "accuracy_minus" else 1
        clipped |= _draw(ax, rows, places, field, reference, scale)
        ax.set_ylim(total - 0.5, -0.5)
        ax.set_yticks(places, names if ax is grid[0] or not across else [""] * len(rows))
        what = "Accuracy, points" if field == "accuracy_minus" else "Validation loss, nats"
        dress(ax, title=f"{what}: minus {label(reference)}", xlabel="")
        ax.grid(False, axis="y")
        for text, row in zip(ax.get_yticklabels(), rows, strict=True):
            text.set_color(colour(row["router"]))
    caption = (
        f"Difference to {label(reference)}, seed by seed, and its 95 % confidence interval. An interval "
        "that holds zero (pale) does not rank the two"
    )
    caption += "; what reaches the edge of the frame goes on beyond it" if clipped else ""
    return Drawing(figure, f"{caption}.")


def _draw(ax: Axes, rows: list[Row], places: list[float], field: str, reference: str, scale: float) -> bool:
    """One panel; whether something lies beyond its scale."""
    intervals = [{k: scale * v for k, v in row[field][reference].items()} for row in rows]
    low, high = _limits(intervals)
    beyond = False
    for y, row, interval in zip(places, rows, intervals, strict=True):
        apart = interval["low"] > 0 or interval["high"] < 0
        tint, mean = colour(row["router"]), interval["mean"]
        if not low <= mean <= high:
            beyond = True
            ax.plot(
                high if mean > high else low, y, marker=">" if mean > high else "<", color=tint, clip_on=False
            )
            continue
        ends = np.clip([interval["low"], interval["high"]], low, high)
        beyond |= bool(interval["low"] < low or interval["high"] > high)
        ax.plot(ends, [y, y], color=tint, linewidth=2.2 if apart else 1.2, alpha=1 if apart else 0.45)
        ax.plot(mean, y, marker="o", markersize=5, color=tint, alpha=1 if apart else 0.45)
    ax.axvline(0, color=THEME["muted"][0], linewidth=0.8)
    ax.set_xlim(low, high)
    ax.locator_params(axis="x", nbins=5)
    return beyond


def _limits(intervals: list[dict[str, float]]) -> tuple[float, float]:
    """Room for all means but far outliers, and for four intervals of five."""
    means = np.abs([interval["mean"] for interval in intervals])
    halves = [interval["high"] - interval["mean"] for interval in intervals]
    reach = max(3 * float(np.median(means)), float(np.quantile(halves, 0.8)), 1e-3)
    kept = [interval for interval in intervals if abs(interval["mean"]) <= 2 * reach] or intervals
    low = min(0.0, *(max(interval["low"], interval["mean"] - reach) for interval in kept))
    high = max(0.0, *(min(interval["high"], interval["mean"] + reach) for interval in kept))
    margin = 0.06 * (high - low)
    return low - margin, high + margin
