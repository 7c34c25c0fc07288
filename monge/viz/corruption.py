"""Figures and table of corrupted inputs: what a corruption costs, by kind and strength."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from monge.viz.lines import legend_inches, name_lines
from monge.viz.names import label, patterns
from monge.viz.numbers import MISSING, increase
from monge.viz.records import Comparison
from monge.viz.style import Drawing, colour, dashes, dress, new_figure

MEANING = {
    "random tokens": "share of the tokens, replaced by random ones",
    "swapped words": "share of the words, swapped with a neighbour",
    "noise": "standard deviation, pixel range 1",
    "blur": "standard deviation, in sides",
    "contrast": "way to the mean of the image",
    "occlusion": "side of the square, in sides",
    "shift": "in sides",
    "salt": "share of the pixels, black or white",
}
"""Corruption -> what its strength is."""


def draw_corruption(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """A panel per corruption: loss increase (text) or accuracy (images) over its strength."""
    rows = [row for row in comparison.rows if row.get("corrupted")]
    if not rows:
        return None
    kinds = list(rows[0]["corrupted"])
    columns = min(len(kinds), 3 if wide else 1)
    lines = -(-len(kinds) // columns)
    routers = [row["router"] for row in rows]
    legend = legend_inches(routers, wide)
    figure = new_figure(7.6 if wide else 3.6, 2.2 * lines + 0.3 + legend)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=comparison.of_images)
    for ax in grid.flat[len(kinds) :]:
        ax.set_visible(False)
    named = []
    pattern = patterns(routers)
    for i, (ax, kind) in enumerate(zip(grid.flat, kinds, strict=False)):
        ends = []
        for row in rows:
            name = row["router"]
            strengths, values = _points(row["corrupted"][kind], row.get("accuracy"))
            style = pattern[name] or dashes(name)
            ax.plot(
                strengths, values, color=colour(name), linestyle=style, linewidth=1.4, marker="o",
                markersize=2.6, label=label(name),
            )  # fmt: skip
            ends.append((values[-1], name))
        first = i % columns == 0
        what = "accuracy" if comparison.of_images else "loss increase, nats"
        dress(ax, title=kind, xlabel=MEANING.get(kind, ""), ylabel=what if first else "")
        if i % columns == columns - 1 or i == len(kinds) - 1 or legend:
            named.append((ax, ends))
    name_lines(figure, named, points_high=110, wide=wide)
    return Drawing(figure, _caption(comparison))


def corruption_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table; empty where nothing was measured."""
    rows = [row for row in comparison.rows if row.get("corrupted")]
    if not rows:
        return [], []
    keys = list(_keys(rows[0]["corrupted"]))
    cells = []
    for row in rows:
        values = [row["corrupted"].get(kind, {}).get(strength) for kind, strength in keys]
        cells.append([label(row["router"]), *(_cell(value, comparison.of_images) for value in values)])
    return ["router", *(f"{kind} {strength}" for kind, strength in keys)], cells


def _keys(corrupted: dict[str, dict[str, float]]) -> Iterator[tuple[str, str]]:
    for kind, by_strength in corrupted.items():
        for strength in by_strength:
            yield kind, strength


def _cell(value: float | None, of_images: bool) -> str:
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if of_images else increase(value)


def _points(by_strength: dict[str, float], clean: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and values, from strength 0 on: the clean accuracy, or no increase of the loss."""
    points = [(0.0, 0.0 if clean is None else clean), *((float(s), v) for s, v in by_strength.items())]
    return np.array([s for s, _ in points]), np.array([v for _, v in points])


def _caption(comparison: Comparison) -> str:
    if comparison.of_images:
        return (
            "Accuracy on corrupted validation images, means over seeds; strength 0 is the image as it is. "
            "Lines that fall together are routers that are equally robust."
        )
    return (
        "By how much corrupted context raises the loss of the tokens left in place, means over seeds. "
        "Lines that rise together are routers that are equally robust."
    )
