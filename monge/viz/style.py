"""The look shared by all figures: colours per series, type, and SVG that follows the light or dark theme.

Figures are drawn in the light colours. In SVG each of those becomes a CSS variable, so that one drawing
serves both themes, inside the report and as a file of its own; PNG files keep the light colours on white.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import TYPE_CHECKING

from monge.viz.names import family, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name: (on white, on near-black). The first hues are Okabe and Ito's, darkened or lightened for contrast;
# every series is also labelled at its end, so that no figure depends on colour alone.
THEME: dict[str, tuple[str, str]] = {
    "ink": ("#1c2127", "#e8eaed"),
    "muted": ("#59626d", "#a3adb8"),
    "grid": ("#e4e7eb", "#2c333b"),
    "paper": ("#ffffff", "#14181d"),
    "grey": ("#77808b", "#98a2ad"),
    "blue": ("#0070b0", "#5cb3ea"),
    "orange": ("#bd7200", "#f2ad3d"),
    "green": ("#00805f", "#2cc79b"),
    "red": ("#a83400", "#f0703a"),
    "violet": ("#9c4b86", "#dc94c6"),
    "brown": ("#775233", "#c8a075"),
    "olive": ("#6b6f00", "#c5c84a"),
    "indigo": ("#4d4fb3", "#a3a5f5"),
}

# Fixed, so that a router keeps its colour from one report to the next; those that share one differ in dashes.
_COLOURS = {
    "dense": "grey", "topk": "red", "switch": "violet", "noisy_topk": "violet", "sigmoid": "indigo",
    "lossfree": "brown", "quantile": "olive", "base": "orange", "sbase": "blue", "expert_choice": "indigo",
    "hash": "grey", "ssr": "blue", "maxscore": "orange", "prices": "green",
}  # fmt: skip
# So does a method of conversion, and the error of a layer at each of its stages.
_COLOURS |= {
    "oracle": "grey", "dot": "blue", "ot_lloyd": "green", "static": "red", "random": "brown",
    "weight_kmeans": "violet", "activation_kmeans": "orange", "cmoe": "olive", "gradient": "indigo",
    "before the refit": "orange", "after the refit": "green", "held-out text": "blue", "converted": "green",
}  # fmt: skip
_DASHED = {"dense", "noisy_topk", "base", "sbase", "expert_choice"}
_DOTTED = {"hash", "oracle"}
_SPARE = ("indigo", "olive", "brown", "violet")
_NAMESPACES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'stroke-linejoin="round" stroke-linecap="butt"'
)


@dataclass(frozen=True)
class Drawing:
    """A figure and the one sentence under it."""

    figure: Figure
    caption: str


def colour_name(series: str) -> str:
    """The name in `THEME` of a series' colour; an unknown name gets a spare one by its letters.

    A series is named after its router or method. What follows a comma or colon tells variants apart, which
    share a colour: ``"static, fine-tuned"`` has that of ``"static"``, ``"ssr:p=1"`` that of ``"ssr"``.
    """
    name = family(series)
    return _COLOURS.get(name, _SPARE[sum(name.encode()) % len(_SPARE)])


def colour(series: str) -> str:
    """A series' colour on white."""
    return THEME[colour_name(series)][0]


def dashes(series: str) -> str:
    """A series' matplotlib line style."""
    name = family(series)
    return "--" if name in _DASHED else ":" if name in _DOTTED else "-"


def theme_css(selector: str) -> str:
    """CSS that declares the theme's colours as variables of ``selector``, light and dark."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in THEME.items()) for i in (0, 1))
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches that belongs to no window and to no global state."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'monge[plot]'.") from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.05))


def dress(ax: Axes, *, title: str, xlabel: str, ylabel: str = "") -> None:
    """Quiet axes: a grid of hairlines, no frame, the title at the left."""
    ink, muted, grid = (THEME[name][0] for name in ("ink", "muted", "grid"))
    ax.set_title(title, loc="left", fontsize=9, color=ink, pad=8, fontweight="bold")
    ax.set_xlabel(xlabel, fontsize=8, color=muted)
    ax.set_ylabel(ylabel, fontsize=8, color=muted)
    ax.tick_params(labelsize=8, length=0, colors=muted, labelcolor=muted)
    ax.patch.set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(True, color=grid, linewidth=0.7)
    for spine in ax.spines.values():
        spine.set_visible(False)


def note(figure: Figure, text: str) -> None:
    """A line above everything else that a figure shows."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=8, color=THEME["orange"][0])


def label_ends(ax: Axes, ends: list[tuple[float, str]], *, points_high: float) -> None:
    """Write each series' name beside the axes, at the height where its line ends or, if taken, nearby.

    Args:
        ax: axes with final limits.
        ends: (value at the end of the line, series).
        points_high: height of the axes in points, to know how far apart names must be.
    """
    low, high, *values = ax.yaxis.get_transform().transform([*ax.get_ylim(), *(y for y, _ in ends)])
    gap = 10.5 / points_high
    wanted = sorted(
        ((min(max((y - low) / (high - low), 0), 1), name) for y, (_, name) in zip(values, ends, strict=True)),
        key=lambda e: e[0],
    )
    placed: list[float] = []
    for at, _ in wanted:
        placed.append(max(at, placed[-1] + gap) if placed else at)
    ceiling = max(1.0, gap * (len(placed) - 1))
    for i in reversed(range(len(placed))):
        ceiling, placed[i] = min(placed[i], ceiling) - gap, min(placed[i], ceiling)
    for (at, name), y in zip(wanted, placed, strict=True):
        ax.plot(
            [1.005, 1.035], [at, y], transform=ax.transAxes, color=colour(name), linewidth=0.8, clip_on=False
        )
        ax.text(1.045, y, label(name), transform=ax.transAxes, color=colour(name), fontsize=8, va="center")


def to_png(figure: Figure) -> bytes:
    """The figure on white, 200 dots per inch, the same bytes for the same records."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor=THEME["paper"][0], metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as ``<svg>`` on a transparent ground, its text as text and its colours as CSS variables.

    Args:
        figure: the figure.
        name: a prefix for the ids inside, so that several drawings can live on one page.
    """
    from matplotlib import rc_context

    buffer = StringIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout stands; the next file need not compute it again
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg {_NAMESPACES} \1>", svg, count=1, flags=re.DOTALL
    )
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _shorten, svg)
    for variable, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)


def _shorten(attribute: re.Match[str]) -> str:
    """Coordinates to hundredths of a point."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute.group())


def standalone(svg: str) -> str:
    """An SVG document that carries its own colours and its own ground, light and dark."""
    at = svg.index(">") + 1
    style = f"<style>{theme_css('svg')}svg{{background:var(--paper)}}</style>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg[:at]}{style}{svg[at:]}'
