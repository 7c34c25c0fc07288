"""The figure of the end: every seed's validation loss, the mean and the spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from monge.viz.columns import Row
from monge.viz.names import rows_of, wrapped
from monge.viz.numbers import loss
from monge.viz.records import Comparison
from monge.viz.style import THEME, Drawing, colour, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_final(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """Final validation loss: a dot per seed, the mean, and one standard deviation to both sides."""
    rows = [row for row in comparison.rows if np.isfinite(row["val_loss_mean"])]
    if not rows:
        return None
    # In the order asked for: an order by loss would look like a ranking, which only intervals give.
    names = [wrapped(row["router"], 34 if wide else 15) for row in rows]
    places, total = rows_of(names)
    figure = new_figure(7.6 if wide else 3.6, 0.75 + 0.3 * total)
    ax = figure.subplots()
    seeds = {row["router"]: [r["val_loss"] for r in comparison.of("eval", row["router"])] for row in rows}
    right = _right_edge(rows, seeds)
    for y, row in zip(places, rows, strict=True):
        _draw_row(ax, y, row, seeds[row["router"]], far=row["val_loss_mean"] > right)
    dress(ax, title="Validation loss after training", xlabel=f"{comparison.unit} (lower is better)")
    ax.margins(x=0.06)
    if np.isfinite(right):
        ax.set_xlim(right=right)
    ax.grid(False, axis="y")
    ax.set_ylim(total - 0.5, -0.5)
    ax.set_yticks(places, names)
    ax.locator_params(axis="x", nbins=6 if wide else 4)
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_color(colour(row["router"]))
    spread = any(row.get("val_loss_std") is not None for row in rows)
    caption = "Validation loss at the end: a dot per seed"
    caption += ", the mean and one standard deviation" if spread else ""
    caption += "; the model with a triangle is too far behind for the scale" if np.isfinite(right) else ""
    return Drawing(
        figure, f"{caption}. Dots of one router that lie far apart say how much a seed alone moves the loss."
    )


def _draw_row(ax: Axes, y: float, row: Row, seeds: list[float], *, far: bool) -> None:
    tint, mean, spread = colour(row["router"]), row["val_loss_mean"], row.get("val_loss_std")
    edge = ax.get_yaxis_transform()  # x in widths of the axes
    if far:  # an arrow at the edge, so that the others keep their resolution
        ax.plot(0.995, y, marker=">", markersize=5, color=tint, transform=edge)
    else:
        ax.scatter(seeds, [y] * len(seeds), s=24, color=tint, alpha=0.5, linewidths=0, zorder=3)
        ax.errorbar(
            mean, y, xerr=spread, fmt="|", markersize=12, color=tint, linewidth=1.4, capsize=3, zorder=4
        )
    ax.text(1.015, y, loss(mean, spread), transform=edge, fontsize=8, va="center", color=THEME["ink"][0])


def _right_edge(rows: list[Row], seeds: dict[str, list[float]]) -> float:
    """Where the axis ends if the last router is so far behind that it would squeeze the rest."""
    *near, last = sorted(rows, key=lambda row: row["val_loss_mean"])
    means = [row["val_loss_mean"] for row in near]
    if len(near) < 3 or last["val_loss_mean"] - means[0] < 4 * (means[-1] - means[0]):
        return np.inf
    seen = means + [value for row in near for value in seeds[row["router"]]]
    return max(seen) + 0.25 * (max(seen) - min(seen))
