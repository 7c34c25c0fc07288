"""Zero-shot tasks: accuracy before and after, and what was kept of it."""

from __future__ import annotations

from monge.viz.conversion.runs import CONVERTED, DENSE, Run
from monge.viz.numbers import percent
from monge.viz.reading import Record
from monge.viz.style import THEME, Drawing, colour, dress, new_figure


def paired_tasks(run: Run) -> list[tuple[Record, Record]]:
    """(dense, converted) records of every task that both have done."""
    done = {row["task"]: row for row in run.of("task", model=CONVERTED)}
    return [(row, done[row["task"]]) for row in run.of("task", model=DENSE) if row["task"] in done]


def kept(dense: float, converted: float, chance: float = 0.0) -> float | None:
    """``(converted - chance) / (dense - chance)``; None where the dense model does not beat chance."""
    return (converted - chance) / (dense - chance) if dense > chance else None


def draw_tasks(run: Run, *, wide: bool) -> Drawing | None:
    """A line per task from the converted to the dense model's accuracy, chance as a bar across."""
    tasks = paired_tasks(run)
    if not tasks:
        return None
    figure = new_figure(7.6 if wide else 3.6, 0.85 + 0.32 * len(tasks))
    ax = figure.subplots()
    for y, (dense, converted) in enumerate(tasks):
        before, after, chance = (
            100 * value for value in (dense["accuracy"], converted["accuracy"], dense["chance"])
        )
        ax.plot([before, after], [y, y], color=THEME["grid"][0], linewidth=2.5, zorder=2)
        ax.plot(chance, y, marker="|", markersize=13, color=THEME["muted"][0], zorder=3)
        for row, at, name in ((dense, before, DENSE), (converted, after, CONVERTED)):
            error = 100 * row["stderr"] if row.get("stderr") else None
            ax.errorbar(at, y, xerr=error, fmt="o", markersize=5.5, color=colour(name), linewidth=1, zorder=4)
        edge = ax.get_yaxis_transform()
        text = percent(kept(dense["accuracy"], converted["accuracy"]))
        ax.text(1.015, y, text, transform=edge, fontsize=8, va="center", color=THEME["ink"][0])
    dress(ax, title="Zero-shot accuracy", xlabel="% correct")
    ax.grid(False, axis="y")
    ax.set_ylim(len(tasks) - 0.5, -0.5)
    ax.set_yticks(range(len(tasks)), [dense["task"] for dense, _ in tasks])
    ax.margins(x=0.06)
    return Drawing(
        figure,
        "Accuracy of the dense model (grey) and of the converted one (green) with standard errors; the bar "
        "is chance, the figure at the right what was kept of the dense model's accuracy.",
    )
