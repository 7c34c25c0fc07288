"""The figure of training: what fine-tuning (or alignment) does to KL and cross-entropy.

Shapes: S seeds, N recorded steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monge.viz.conversion.results import Result
from monge.viz.lines import Curves, bands, cut_points, draw_lines, frame, smooth
from monge.viz.style import Drawing, dress, label_ends, new_figure

STAGE = "finetune"
_PANELS = {"kl": "KL to the dense model", "ce": "Cross-entropy of the next token"}


def draw_training(results: Sequence[Result], *, wide: bool) -> Drawing | None:
    """KL and cross-entropy on training text over the steps of fine-tuning."""
    panels = {field: training_curves(results, field) for field in _PANELS}
    panels = {field: curves for field, curves in panels.items() if curves}
    if not panels:
        return None
    height = 2.9 if wide else 2.3 * len(panels) + 0.2
    figure = new_figure(7.6 if wide else 3.6, height)
    grid = (1, len(panels)) if wide else (len(panels), 1)
    points_high = 72 * (height / grid[0] - 0.9)
    for ax, (field, curves) in zip(figure.subplots(*grid, squeeze=False).flat, panels.items(), strict=True):
        smoothed = {name: (steps, smooth(values)) for name, (steps, values) in curves.items()}
        draw_lines(ax, smoothed)
        dress(ax, title=_PANELS[field], xlabel="fine-tuning step", ylabel="nats per token")
        ax.set_ylim(*frame(smoothed))
        label_ends(ax, [(v.mean(0)[-1], name) for name, (_, v) in smoothed.items()], points_high=points_high)
    curves = panels[next(iter(panels))]
    caption = f"Fine-tuning on training text, a moving mean over a tenth of the steps ({bands(curves)}"
    caption += "; the first steps may lie above the frame)" if cut_points(curves) else ")"
    return Drawing(figure, f"{caption}.")


def training_curves(results: Sequence[Result], field: str) -> Curves:
    """Series -> steps and (S, N) values, over the steps that all seeds of a result recorded."""
    curves: Curves = {}
    for result in results:
        traces = [
            {
                row["step"]: float(row[field])
                for row in run.of("train", stage=STAGE)
                if row.get(field) is not None
            }
            for run in result.runs
        ]
        traces = [trace for trace in traces if trace]
        steps = sorted(set.intersection(*map(set, traces))) if traces else []
        if len(steps) > 1:
            values = np.array([[trace[step] for step in steps] for trace in traces])
            curves[_name(result, results)] = np.array(steps), values
    return curves


def _name(result: Result, results: Sequence[Result]) -> str:
    """Without 'fine-tuned', as all are here; with the active share where the method was tuned at several."""
    name, share = result.name.replace(", fine-tuned", ""), result.row["ffn_active"]
    several = sum(other.name == result.name for other in results) > 1
    return f"{name}, {100 * share:.0f} %" if several and share is not None else name
