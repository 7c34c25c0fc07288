"""The figure of a sweep: one router with several values of one numeric option, beside the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from monge.viz.columns import Row
from monge.viz.names import family, label, option_value
from monge.viz.records import Comparison
from monge.viz.style import THEME, Drawing, colour, dashes, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 3  # values that make a sweep


def draw_sweep(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """Validation loss and imbalance over the option's value; the reference is a line with its spread."""
    found = find_sweep(comparison.rows)
    if found is None:
        return None
    name, option, points = found
    values = np.array([value for value, _ in points])
    reference = next((row for row in comparison.rows if row["router"] == comparison.reference), None)
    figure = new_figure(7.6 if wide else 3.6, 2.7 if wide else 4.6)
    axes = figure.subplots(*((1, 2) if wide else (2, 1)))
    for ax, field, spread, title in (
        (axes[0], "val_loss_mean", "val_loss_std", f"Validation loss, {comparison.unit}"),
        (axes[1], "max_violation", "", "Imbalance on validation data"),
    ):
        means = np.array([row[field] for _, row in points], dtype=float)
        errors = [row.get(spread) or 0.0 for _, row in points] if spread else None
        ax.errorbar(
            values, means, yerr=errors, fmt="o-", markersize=4, capsize=3, color=colour(name), linewidth=1.4
        )
        if reference is not None and reference.get(field) is not None:
            _draw_reference(ax, reference, field, spread)
        if values.min() > 0 and values.max() / values.min() > 30:
            ax.set_xscale("log")
        dress(ax, title=title, xlabel=f"{option} of {name}")
    caption = f"{name} with {option} from {values.min():g} to {values.max():g}"
    caption += f"; the horizontal line is {label(reference['router'])}" if reference is not None else ""
    caption += ". Bars and band: one standard deviation over seeds" if comparison.seeds > 1 else ""
    return Drawing(figure, f"{caption}. A level curve says that {option} does not matter at this scale.")


def find_sweep(rows: list[Row]) -> tuple[str, str, list[tuple[float, Row]]] | None:
    """(router, option, [(value, row)] by value) of the longest sweep of one option alone, or None."""
    sweeps: dict[tuple[str, str], dict[float, Row]] = {}
    for row in rows:
        options = row["router"].partition(":")[2].split(",")
        if len(options) == 1 and (option := options[0].partition("=")[0]):
            value = option_value(row["router"], option)
            if value is not None:
                sweeps.setdefault((family(row["router"]), option), {})[value] = row
    if not sweeps:
        return None
    (name, option), points = max(sweeps.items(), key=lambda item: len(item[1]))
    return (name, option, sorted(points.items(), key=lambda p: p[0])) if len(points) >= LEAST else None


def _draw_reference(ax: Axes, row: Row, field: str, spread: str) -> None:
    tint = colour(row["router"])
    ax.axhline(row[field], color=tint, linestyle=dashes(row["router"]), linewidth=1.2)
    if spread and row.get(spread):
        ax.axhspan(row[field] - row[spread], row[field] + row[spread], color=tint, alpha=0.13, linewidth=0)
    ax.text(
        0.99, row[field], label(row["router"]), transform=ax.get_yaxis_transform(), fontsize=8, ha="right",
        va="bottom", color=THEME["ink"][0],
    )  # fmt: skip
