"""The figures of an audit: the load of every expert, and what differs from layer to layer.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import math

import numpy as np

from monge.viz.audit.run import AuditRun
from monge.viz.heatmap import draw_key, paint
from monge.viz.style import THEME, Drawing, dress, new_figure


def draw_loads(run: AuditRun, *, wide: bool) -> Drawing | None:
    """Load over mean load, a line per layer, its experts from the busiest to the idlest."""
    from matplotlib.ticker import MaxNLocator

    loads = [np.sort(np.asarray(row["load"], dtype=float))[::-1] for row in run.layers]
    if not loads or not all(load.sum() for load in loads):
        return None
    image_LE = np.ones((len(loads), max(map(len, loads))))
    for line, load_E in zip(image_LE, loads, strict=True):
        line[: len(load_E)] = load_E / load_E.mean()
    figure = new_figure(7.6 if wide else 3.6, 1.3 + max(0.8, 0.085 * len(loads)))
    ax = figure.subplots()
    edges = (0.5, image_LE.shape[1] + 0.5, len(loads) - 0.5, -0.5)
    ax.imshow(paint(image_LE), aspect="auto", interpolation="nearest", extent=edges)
    dress(ax, title="Load of the experts", xlabel="experts of a layer, by load", ylabel="layer")
    ax.grid(False)
    ax.spines[:].set(visible=True, color=THEME["grid"][0], linewidth=0.8)
    ticks = np.unique(np.linspace(0, len(loads) - 1, min(len(loads), 6)).round().astype(int))
    ax.set_yticks(ticks, [str(run.layers[i]["layer"]) for i in ticks])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    draw_key(figure, [ax])
    return Drawing(
        figure,
        "Slots of every expert relative to an equal share, a line per layer: orange is more, blue is less, "
        "and a balanced expert has the colour of the page.",
    )


def draw_layers(run: AuditRun, *, wide: bool) -> Drawing | None:
    """Small panels over the layers: entropies, what a capacity drops, specialisation, flips."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    panels = layer_curves(run)
    if not panels or len(run.layers) < 2:
        return None
    across = 2 if wide else 1
    lines = -(-len(panels) // across)
    figure = new_figure(7.6 if wide else 3.6, 1.75 * lines)
    grid = figure.subplots(lines, across, squeeze=False)
    layers = [row["layer"] for row in run.layers]
    for ax in grid.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for (name, values), tint, style in zip(
            curves.items(), ("blue", "orange"), (("-", "o"), ("--", "s")), strict=False
        ):
            look = {"marker": style[1], "markersize": 3, "linewidth": 1.4, "color": THEME[tint][0]}
            ax.plot(layers, values, style[0], label=name, **look)
        dress(ax, title=title, xlabel="layer")
        ax.set_ylim(0, 1.15 * max(max(values) for values in curves.values()) or 1)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if len(curves) > 1:
            ax.legend(fontsize=7.5, frameon=False, labelcolor=THEME["ink"][0], loc="best")
    return Drawing(
        figure,
        "Layer by layer. Entropy: of the load and, averaged over tokens, of the router's softmax, as shares "
        "of the largest possible. Drops: slots that exceed a static capacity, as a factor of an equal share.",
    )


def layer_curves(run: AuditRun) -> dict[str, dict[str, list[float]]]:
    """Panel -> curve -> a share per layer; what was not measured is left out."""
    rows = run.layers
    if not rows:
        return {}
    most = [math.log(max(row["num_experts"], 2)) for row in rows]
    panels: dict[str, dict[str, list[float]]] = {
        "Entropy": {"of the load": [row["load_entropy"] / top for row, top in zip(rows, most)]}
    }
    if all(row["routing_entropy"] is not None for row in rows):
        panels["Entropy"]["of a token"] = [row["routing_entropy"] / top for row, top in zip(rows, most)]
    panels["Drops under a static capacity"] = {
        f"factor {factor}": [row["drops"][factor] for row in rows] for factor in rows[0]["drops"]
    }
    if all(row["information"] is not None for row in rows):
        known = math.log(max(len(run.summary.get("domains", {})), 2))
        panels["What an expert tells about the domain"] = {
            "measured": [row["information"] / known for row in rows],
            "by chance": [row["information_chance"] / known for row in rows],
        }
    if all(row["flips"] is not None for row in rows):
        name = f"Routes that change in {run.summary.get('precision', 'the other precision')}"
        panels[name] = {"slots": [row["flips"] for row in rows]}
    return panels
