"""How a router is called on the page: short, and told apart from its variants.

A router with options is spelled ``ssr:p=0.05,carry=True``, which is how records name it and how the command
takes it; figures and tables write ``ssr p=0.05 carry``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

# The first variant of a router has its own dashes, the others these, in their order.
_PATTERNS: tuple[object, ...] = (
    (0, (6, 2)), (0, (1, 1.2)), (0, (8, 1.5, 1, 1.5)), (0, (2.5, 1)), (0, (8, 1.5, 1, 1.5, 1, 1.5)),
    (0, (10, 4)), (0, (2, 3)), (0, (4, 1, 2, 1)), (0, (1, 3)),
)  # fmt: skip


def label(router: str) -> str:
    """The name, then its options: a switch by name, a word by itself, a number with its name.

    Examples:
        >>> from monge.viz.names import label
        >>> label("maxscore:flow=False,gates=annealed,coefficient=0.01"), label("ssr:carry=True")
        ('maxscore no flow annealed coefficient=0.01', 'ssr carry')
    """
    name, _, rest = router.partition(":")
    words = [name]
    for part in rest.split(",") if rest else []:
        option, _, value = part.partition("=")
        switch = {"true": option, "false": f"no {option}"}.get(value.lower())
        words.append(switch or (value if value.replace("_", "a").isalpha() else f"{option}={value}"))
    return " ".join(words)


def wrapped(router: str, width: int) -> str:
    """The label in lines of at most ``width`` characters, broken between words."""
    return textwrap.fill(label(router), width, break_long_words=False, break_on_hyphens=False)


def rows_of(names: Iterable[str]) -> tuple[list[float], float]:
    """Where rows with names of one line or more are centred, and how high they are together, in single rows.

    Examples:
        >>> from monge.viz.names import rows_of
        >>> rows_of(["a", "b\\nc", "d"])
        ([0.0, 1.25, 2.5], 3.5)
    """
    heights = [1 + 0.5 * name.count("\n") for name in names]
    tops = [sum(heights[:i]) for i in range(len(heights))]
    return [top + height / 2 - 0.5 for top, height in zip(tops, heights, strict=True)], sum(heights)


def family(series: str) -> str:
    """The router or method of a series; what follows a colon or comma tells its variants apart."""
    return series.replace(":", ",").split(",")[0]


def patterns(series: Iterable[str]) -> dict[str, object | None]:
    """The dashes of every series, None where it has those of its family: the first of each."""
    seen: dict[str, int] = {}
    chosen: dict[str, object | None] = {}
    for name in series:
        place = seen.get(family(name), 0)
        seen[family(name)] = place + 1
        chosen[name] = _PATTERNS[(place - 1) % len(_PATTERNS)] if place else None
    return chosen


def option_value(router: str, option: str) -> float | None:
    """The number that a spelling gives an option, or None.

    Examples:
        >>> from monge.viz.names import option_value
        >>> option_value("ssr:p=0.3,carry=True", "p"), option_value("ssr", "p")
        (0.3, None)
    """
    for part in router.partition(":")[2].split(","):
        name, _, value = part.partition("=")
        if name == option:
            try:
                return float(value)
            except ValueError:
                return None
    return None
