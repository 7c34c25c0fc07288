"""The figure of quality against active share: every result, the oracle and the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from monge.viz.columns import Row
from monge.viz.conversion.results import Result, dense_row, oracle_row
from monge.viz.conversion.runs import DENSE, ORACLE
from monge.viz.style import Drawing, colour, dashes, dress, label_ends, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[str, list[Row]]
_PANELS = {
    "ratio": "Perplexity / dense perplexity",
    "kl": "KL to the dense model, nats",
    "cosine": "Cosine with the dense model's embeddings",
}
_RANGE = 3.0  # values further apart than this ratio get a logarithmic axis
_ALL = 100.0


def draw_quality(results: Sequence[Result], *, wide: bool) -> Drawing | None:
    """Ratio of perplexities and KL (or the cosine of an encoder) against the share of FFN neurons in use."""
    series = _series(results)
    panels = [
        name for name in _PANELS if any(row[name] is not None for rows in series.values() for row in rows)
    ]
    if not panels:
        return None
    figure = new_figure(7.6 if wide else 3.6, 2.6 * len(panels) + 0.2)
    dense = dense_row(results[0].runs[0])
    for ax, name in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        _draw_panel(ax, series, name, dense[name] or None, points_high=72 * 1.8)
    return Drawing(figure, _caption(results, ORACLE in series))


def _series(results: Sequence[Result]) -> Series:
    """The points of every line by active share, the oracle's last."""
    series: Series = {}
    for result in results:
        series.setdefault(result.name, []).append(result.row)
    oracle = {}
    for result in results:
        row = oracle_row(result.runs[0])
        if row is not None:
            oracle[row["ffn_active"]] = row
    series |= {ORACLE: list(oracle.values())} if oracle else {}
    known = {name: [row for row in rows if row["ffn_active"] is not None] for name, rows in series.items()}
    return {name: sorted(rows, key=lambda row: row["ffn_active"]) for name, rows in known.items() if rows}


def _draw_panel(ax: Axes, series: Series, name: str, dense: float | None, *, points_high: float) -> None:
    ends = []
    for label, rows in series.items():
        points = [row for row in rows if row[name] is not None]
        if not points:
            continue
        x, y = [_ALL * row["ffn_active"] for row in points], [row[name] for row in points]
        spread = [row.get(f"{name}_std") or 0.0 for row in points]
        tint = colour(label)
        fill = "none" if label == ORACLE else "full"
        ax.plot(x, y, dashes(label), color=tint, linewidth=1.5, marker=_marker(label), ms=5.5, fillstyle=fill)
        if any(spread):
            ax.errorbar(x, y, yerr=spread, fmt="none", color=tint, linewidth=1.2, capsize=3)
        ax.plot([x[-1], _ALL], [y[-1], y[-1]], color=tint, linewidth=0.6, alpha=0.45)
        ends.append((y[-1], label))
    if dense is not None:
        ax.axhline(dense, color=colour(DENSE), linewidth=1.2, linestyle=dashes(DENSE))
        ax.plot(_ALL, dense, color=colour(DENSE), marker="o", markersize=5.5, clip_on=False)
        ends.append((dense, DENSE))
    dress(ax, title=_PANELS[name], xlabel="FFN neurons that a token uses, %")
    shown = [row for rows in series.values() for row in rows if row[name] is not None]
    _scale(ax, name, [*(row[name] for row in shown), dense if dense is not None else shown[0][name]])
    least = _ALL * min(row["ffn_active"] for row in shown)
    ax.set_xlim(0 if least < _ALL / 2 else 10 * (least // 10 - 1), _ALL)
    label_ends(ax, ends, points_high=points_high)


def _scale(ax: Axes, name: str, values: list[float]) -> None:
    """A logarithmic axis with plain numbers where the values call for one; KL otherwise from 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if min(values) > 0 and max(positive) / min(positive) > _RANGE:
        ax.set_yscale("log")
        steps = (1.0, 2.0, 5.0) if max(positive) / min(positive) < 200 else (1.0,)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", which="minor", length=0)
    elif name == "kl":
        ax.set_ylim(bottom=0.0, top=1.15 * max(values) or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.margins(y=0.09)


def _marker(label: str) -> str:
    return "D" if "fine-tuned" in label else "o"


def _caption(results: Sequence[Result], oracle: bool) -> str:
    parts = ["Quality on held-out text against the share of FFN neurons that a token uses; dense is at 100 %"]
    if any("fine-tuned" in result.name for result in results):
        parts.append("diamonds were fine-tuned")
    if oracle:
        parts.append(
            "the oracle takes, for every token, the neurons that matter most to that token, unchanged"
        )
    several = max(len(result.runs) for result in results)
    parts.append("bars: one standard deviation over seeds" if several > 1 else "one seed each, hence no bars")
    return "; ".join(parts) + "."
