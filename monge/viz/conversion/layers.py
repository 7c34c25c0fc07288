"""The figure of the layers: relative errors before and after the refit, on held-out text, of the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monge.viz.conversion.runs import ORACLE, Run
from monge.viz.style import Drawing, colour, dashes, dress, label_ends, new_figure


@dataclass(frozen=True)
class Line:
    """Where the values of a line stand in the records, and what they are."""

    kind: str
    field: str
    meaning: str


LINES = {
    "before the refit": Line(
        "layer",
        "error_before_refit",
        "on calibration text that the refit leaves out, against the output it aims at",
    ),
    "after the refit": Line("layer", "error", "likewise, with the output projection fitted anew"),
    "held-out text": Line(
        "layer_eval", "error", "of the finished model, against the dense FFN on the same inputs"
    ),
    ORACLE: Line(
        "layer_eval", "oracle", "likewise, for the best neurons of every token, as many and unchanged"
    ),
}


def draw_layers(run: Run, *, wide: bool) -> Drawing | None:
    """Relative error of every converted layer, a line for each stage that was recorded."""
    from matplotlib.ticker import MaxNLocator

    lines = layer_errors(run)
    if not lines:
        return None
    width, height = (7.6, 3.0) if wide else (3.6, 2.7)
    figure = new_figure(width, height)
    ax = figure.subplots()
    for name, (layers, errors) in lines.items():
        gaps = np.flatnonzero(np.diff(layers) > 1) + 1  # no line across layers that stayed dense
        for part, values in zip(np.split(layers, gaps), np.split(errors, gaps), strict=True):
            ax.plot(part, values, dashes(name), color=colour(name), marker="o", markersize=3.2, linewidth=1.5)
    dress(ax, title="Relative error of a layer", xlabel="layer")
    ax.set_ylim(0, 1.08 * max(errors.max() for _, errors in lines.values()) or 1)
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(
        MaxNLocator(10 if wide else 5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    label_ends(
        ax, [(errors[-1], name) for name, (_, errors) in lines.items()], points_high=72 * (height - 0.9)
    )
    meanings = "; ".join(f"{name}: {LINES[name].meaning}" for name in lines)
    return Drawing(
        figure,
        f"Squared error over squared output of every converted FFN. {meanings[0].upper()}{meanings[1:]}.",
    )


def layer_errors(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Line -> layers and errors, of the converted layers alone; lines without values are left out."""
    lines = {}
    for name, line in LINES.items():
        rows = [
            row for row in run.of(line.kind) if is_converted(run, row) and row.get(line.field) is not None
        ]
        rows.sort(key=lambda row: row["layer"])
        if rows:
            lines[name] = np.array([r["layer"] for r in rows]), np.array([float(r[line.field]) for r in rows])
    return lines


def is_converted(run: Run, row: dict[str, object]) -> bool:
    """Whether a layer's record is of a layer that did not stay dense."""
    layers = run.plan.get("layers")
    return row["layer"] in layers if layers else bool(row.get("load")) or row["error"] != 0
