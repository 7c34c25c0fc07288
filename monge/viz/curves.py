"""Figures over training steps: losses and violation.

Shapes: S seeds, N recorded steps.
"""

from __future__ import annotations

import numpy as np

from monge.viz.lines import (
    Curves,
    bands,
    cut_points,
    draw_lines,
    frame,
    legend_inches,
    name_lines,
    smooth,
)
from monge.viz.names import label
from monge.viz.records import DENSE, Comparison
from monge.viz.style import Drawing, colour, dashes, dress, new_figure


def draw_losses(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """Training loss and, beside it (below, if narrow), the validation loss relative to one router."""
    curves = _curves(comparison, "train", "loss", comparison.routers)
    if not curves:
        return None
    reference = comparison.reference
    relative = _relative(comparison, reference) if reference else {}
    panels = 2 if relative else 1
    height = 2.9 if wide else 2.3 * panels + 0.2
    figure = new_figure(7.6 if wide else 3.6, height + legend_inches(list(curves), wide))
    axes = figure.subplots(*((1, panels) if wide else (panels, 1)), squeeze=False).flat
    points_high = 72 * (height / (1 if wide else panels) - 0.9)

    ax = axes[0]
    smoothed = {name: (steps, smooth(values)) for name, (steps, values) in curves.items()}
    draw_lines(ax, smoothed)
    dress(ax, title="Training loss", xlabel="optimizer step", ylabel=comparison.unit)
    ax.set_ylim(*frame(smoothed))
    named = [(ax, [(v.mean(0)[-1], name) for name, (_, v) in smoothed.items()])]
    if reference and relative:
        ax = axes[1]
        ax.axhline(0, color=colour(reference), linewidth=1.4, linestyle=dashes(reference))
        draw_lines(ax, relative, marker="o", among=curves)
        dress(ax, title=f"Validation loss minus {label(reference)}'s", xlabel="optimizer step")
        ends = [(v.mean(0)[-1], name) for name, (_, v) in relative.items()]
        named.append((ax, [*ends, (0.0, reference)]))
    name_lines(figure, named, points_high=points_high, wide=wide)
    caption = f"Loss during training, a moving mean over a tenth of the run ({bands(smoothed)}"
    caption += "; the first steps lie above the frame)" if cut_points(smoothed) else ")"
    if reference and relative:
        caption += (
            f", and the difference to {label(reference)}, taken seed by seed on part of the validation set"
        )
        caption += ": below zero a router learns faster"
    return Drawing(figure, f"{caption}.")


def draw_violation(comparison: Comparison, *, wide: bool) -> Drawing | None:
    """Largest load over mean load minus one, during training."""
    routers = [name for name in comparison.routers if name != DENSE]
    curves = _curves(comparison, "train", "max_violation", routers)
    if not curves:
        return None
    width, height = (7.6, 2.7) if wide else (3.6, 2.5)
    figure = new_figure(width, height + legend_inches(list(curves), wide))
    ax = figure.subplots()
    smoothed = {name: (steps, smooth(values)) for name, (steps, values) in curves.items()}
    draw_lines(ax, smoothed)
    title = "Largest load / mean load - 1"
    dress(ax, title=f"Imbalance in training: {title.lower()}" if wide else title, xlabel="optimizer step")
    top = max(np.quantile(v, 0.98) for _, v in smoothed.values())
    ax.set_ylim(-0.03 * max(top, 0.1), 1.08 * max(top, 0.1))
    ends = [(v.mean(0)[-1], n) for n, (_, v) in smoothed.items()]
    name_lines(figure, [(ax, ends)], points_high=72 * (height - 0.8), wide=wide)
    return Drawing(
        figure,
        f"How far the busiest expert exceeds its share in training, a moving mean ({bands(smoothed)}): at 0 "
        "all experts get the same, and a line that stays up is a router that does not balance by itself.",
    )


def _curves(comparison: Comparison, kind: str, field: str, routers: list[str]) -> Curves:
    curves = {name: comparison.curve(kind, name, field) for name in routers}
    return {name: (steps, values) for name, (steps, values) in curves.items() if len(steps) > 1}


def _relative(comparison: Comparison, reference: str) -> Curves:
    """Seed by seed: both routers of a seed saw the same data, so most of the noise cancels."""
    base_steps, base_SN = comparison.curve("val", reference, "val_loss")
    relative = {}
    for name in comparison.routers:
        steps, values_SN = comparison.curve("val", name, "val_loss")
        seeds = min(len(values_SN), len(base_SN))
        common, at, base_at = np.intersect1d(steps, base_steps, return_indices=True)
        if name not in (reference, DENSE) and seeds and len(common) > 1:
            relative[name] = (common, values_SN[:seeds, at] - base_SN[:seeds, base_at])
    return relative
