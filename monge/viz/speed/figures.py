"""The figures of `monge bench`: bars, a group a case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from monge.viz.reading import Record
from monge.viz.speed.run import DENSE, MONGE, SpeedRun, share
from monge.viz.style import THEME, Drawing, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TINTS = {MONGE: "blue", "eager": "brown", "batched_mm": "grey", "grouped_mm": "orange"}
LIMIT = "dense without FFNs"


def draw_inference(run: SpeedRun, *, wide: bool) -> Drawing | None:
    """Times faster than the dense FFN, by case and candidate."""
    rows = run.of("inference")
    labels = [f"{row['phase']}, {share(row)}\n{row['dtype']}" for row in rows]
    caption = (
        "A forward of the experts, their routing given: how many times faster than the dense FFN that they "
        "are cut from (the line at 1). The neurons that are left out allow 4 times at 25 % and 2 times at "
        "50 %; more says that the dense product itself is not at the limit."
    )
    return _bars(rows, "times_dense", labels, "Forward: speed over dense", caption, wide=wide)


def draw_training(run: SpeedRun, *, wide: bool) -> Drawing | None:
    """FLOP/s of a training step as a share of the dense FFN's."""
    rows = run.of("training")
    labels = [f"{row['layer']}\n{row['dtype']}" for row in rows]
    caption = "Forward and backward of the experts at 2,048 tokens, beside a dense FFN of equal FLOPs (at 1)."
    return _bars(rows, "flops_of_dense", labels, "Training: speed over dense", caption, wide=wide)


def draw_models(run: SpeedRun, *, wide: bool) -> Drawing | None:
    """Tokens per second of a whole model, relative to the dense one."""
    rows = run.of("model")
    base = next((row for row in rows if row["name"] == DENSE), None)
    if base is None:
        return None
    figure = new_figure(7.6 if wide else 3.6, 0.9 + 0.34 * len(rows) * (1 if wide else 2))
    panels = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
    for ax, name in zip(panels, ("prefill", "decode"), strict=True):
        key = f"{name}_tokens_per_s"
        values = [row[key] / base[key] for row in rows]
        tints = [
            THEME["blue" if row["name"] == MONGE else "green" if row["name"] == LIMIT else "grey"][0]
            for row in rows
        ]
        places = np.arange(len(rows))
        ax.barh(places, values, color=tints, height=0.66)
        _write_values(ax, places, values)
        ax.set_yticks(places, [row["name"].removeprefix("transformers ") for row in rows])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.15 * max(values))
        dress(ax, title=name.capitalize(), xlabel="tokens per second, of the dense model")
    return Drawing(
        figure,
        "Tokens per second of the whole model, relative to the dense model. Without its FFNs the dense model "
        "shows what attention and the head take: no mixture of experts can be faster.",
    )


def _bars(
    rows: list[Record], figures: str, labels: list[str], title: str, caption: str, *, wide: bool
) -> Drawing | None:
    """A group of bars a row, one a candidate, and a line at the dense FFN."""
    if not rows:
        return None
    names = [name for name in TINTS if any(name in row[figures] for row in rows)]
    figure = new_figure(7.6 if wide else 3.6, 0.9 + 0.16 * len(rows) * (len(names) + 1))
    ax = figure.subplots()
    height, widest = 0.8 / len(names), 1.12 * max(max(row[figures].values()) for row in rows)
    for index, name in enumerate(names):
        places = np.arange(len(rows)) + (index - (len(names) - 1) / 2) * height
        values = [row[figures].get(name, 0.0) for row in rows]
        ax.barh(places, values, height=height, color=THEME[TINTS[name]][0], label=name)
        upon_line = [1 - 0.06 * widest < value < 1 for value in values]
        _write_values(ax, places, values, [1 if upon else x for x, upon in zip(values, upon_line)])
    ax.set_yticks(np.arange(len(rows)), labels)
    ax.set_xlim(0, widest)
    dress(ax, title=title, xlabel="")
    ax.axvline(1, color=THEME["ink"][0], linewidth=0.8)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    look = {"fontsize": 7.5, "frameon": False, "labelcolor": THEME["ink"][0]}
    figure.legend(loc="outside lower center", ncols=len(names) if wide else 2, **look)
    return Drawing(figure, caption)


def _write_values(ax: Axes, places: np.ndarray, values: list[float], ends: list[float] | None = None) -> None:
    """Each figure at the end of its bar, or at another of ``ends``; none where there is no bar."""
    for place, value, end in zip(places, values, ends or values, strict=True):
        if value:
            text = ax.annotate(f"{value:.2f}", (end, place), (3, 0), textcoords="offset points", va="center")
            text.set(fontsize=6.5, color=THEME["ink"][0])
