"""The routing map: the load of every expert in every layer.

Shapes: L layers, E routed experts.
"""

from __future__ import annotations

import numpy as np

from monge.viz.conversion.runs import Run
from monge.viz.heatmap import draw_key, paint
from monge.viz.style import THEME, Drawing, dress, new_figure

KINDS = {"layer": "calibration text", "layer_eval": "held-out text"}


def draw_routing(run: Run, *, wide: bool) -> Drawing | None:
    """Load over mean load by layer and expert, on calibration and on held-out text."""
    from matplotlib.ticker import MaxNLocator

    maps = {title: loads_of(run, kind) for kind, title in KINDS.items()}
    maps = {title: loads for title, loads in maps.items() if loads}
    if not maps:
        return None
    order = {layer: np.argsort(-load) for layer, load in next(iter(maps.values())).items()}
    first, last = min(order), max(order)
    across = len(maps) if wide else 1
    high = 0.8 + 0.085 * (last - first + 1)
    figure = new_figure(7.6 if wide else 3.6, 0.8 + max(1.5, high) * (len(maps) // across))
    grid = figure.subplots(len(maps) // across, across, squeeze=False)
    for index, (ax, (title, loads)) in enumerate(zip(grid.flat, maps.items(), strict=True)):
        image_LE = np.ones((last - first + 1, max(map(len, loads.values()))))
        for layer, load_E in loads.items():
            if layer in order and len(order[layer]) == len(load_E):
                load_E = load_E[order[layer]]
            image_LE[layer - first, : len(load_E)] = load_E
        edges = (0.5, image_LE.shape[1] + 0.5, last + 0.5, first - 0.5)
        ax.imshow(paint(image_LE), aspect="auto", interpolation="nearest", extent=edges)
        dress(
            ax,
            title=f"On {title}",
            xlabel=f"expert, by load on {next(iter(maps))}",
            ylabel="layer" * (index % across == 0),
        )
        ax.grid(False)
        ax.spines[:].set(visible=True, color=THEME["grid"][0], linewidth=0.8)
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    draw_key(figure, list(grid.flat))
    return Drawing(
        figure,
        "Load of every routed expert, a line per layer, its experts in one order: orange is more than an "
        "equal share, blue is less, and a balanced expert has the colour of the page.",
    )


def loads_of(run: Run, kind: str) -> dict[int, np.ndarray]:
    """Layer -> (E,) load over mean load, of layers with routed experts."""
    loads = {row["layer"]: np.asarray(row.get("load") or [], dtype=float) for row in run.of(kind)}
    return {layer: load / load.mean() for layer, load in sorted(loads.items()) if load.sum() > 0}
