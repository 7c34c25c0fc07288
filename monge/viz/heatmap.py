"""The load of every expert over training, one panel per router.

Shapes: N recorded steps, L layers, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from monge.viz.names import wrapped
from monge.viz.records import DENSE, Comparison
from monge.viz.style import THEME, Drawing, colour, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OCTAVES = 2.0  # loads beyond 4 times the mean, or below a quarter of it, share the last colour


def draw_loads(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """Load over mean load by expert and step; a balanced expert is the colour of the page."""
    from matplotlib.ticker import MaxNLocator

    panels = [(name, *comparison.loads(name)) for name in comparison.routers if name != DENSE]
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return None
    columns = len(panels) if len(panels) <= 4 else min(-(-len(panels) // 2), 4)
    columns = columns if wide else min(len(panels), 2)
    lines = -(-len(panels) // columns)
    rows_of_title = max(wrapped(name, 22).count("\n") for name, *_ in panels)
    figure = new_figure(7.6 if wide else 3.6, (1.55 + 0.15 * rows_of_title) * lines + 0.75)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for ax in grid.flat[len(panels) :]:
        ax.set_visible(False)
    for i, (ax, (name, steps, loads_NLE)) in enumerate(zip(grid.flat, panels, strict=False)):
        layers, experts = loads_NLE.shape[1:]
        image = loads_NLE.reshape(len(steps), layers * experts).T * experts
        edges = (steps[0], steps[-1], layers * experts, 0)
        ax.imshow(paint(image), aspect="auto", interpolation="nearest", extent=edges)
        bottom = i + columns >= len(panels)
        dress(ax, title=wrapped(name, 22), xlabel="optimizer step" if bottom else "")
        ax.title.set_color(colour(name))
        ax.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        ax.spines[:].set(visible=True, color=THEME["grid"][0], linewidth=0.8)
        ax.tick_params(labelbottom=bottom)
        for layer in range(1, layers):
            ax.axhline(layer * experts, color=THEME["grid"][0], linewidth=0.8)
        first = i % columns == 0
        ax.set_yticks(
            [(layer + 0.5) * experts for layer in range(layers)], _layer_names(layers) if first else []
        )
    draw_key(figure, list(grid.flat[: len(panels)]))
    return Drawing(
        figure,
        "Load of every expert (one line each, layers from the top) over training, first seed: orange is more "
        "than its share, blue is less, and a balanced expert has the colour of the page. A blue line that "
        "lasts is an expert that dies, an orange one an expert that takes its tokens.",
    )


def _layer_names(layers: int) -> list[str]:
    return [f"layer {layer}" for layer in range(layers)]


def paint(load: np.ndarray) -> np.ndarray:
    """RGBA of loads relative to the mean: orange above, blue below, transparent at 1: it suits any ground."""
    octaves = np.clip(np.log2(np.maximum(load, 1e-9)) / _OCTAVES, -1, 1)
    rgba = np.empty((*load.shape, 4))
    rgba[..., :3] = np.where((octaves > 0)[..., None], (0.87, 0.45, 0.0), (0.0, 0.42, 0.75))
    rgba[..., 3] = np.abs(octaves)
    return rgba


def draw_key(figure: Figure, axes: list[Axes]) -> None:
    """The colour scale of `paint` below the panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = np.linspace(-_OCTAVES, _OCTAVES, 241)
    mappable = ScalarMappable(Normalize(-_OCTAVES, _OCTAVES), ListedColormap(paint(2**scale)))
    bar = figure.colorbar(
        mappable, ax=axes, location="bottom", fraction=0.04, shrink=0.6, aspect=34, pad=0.03
    )
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=THEME["muted"][0])
    bar.outline.set_visible(False)
    bar.set_label("load / mean load", fontsize=8, color=THEME["muted"][0])
