"""How numbers are written, the same way on the page, in figures and in the terminal."""

from __future__ import annotations

MISSING = "-"


def loss(value: float | None, spread: float | None = None) -> str:
    """Four decimals and, where there is one, the standard deviation."""
    if value is None:
        return MISSING
    return f"{value:.4f}" if spread is None else f"{value:.4f} ± {spread:.4f}"


def ratio(value: float | None) -> str:
    """Two decimals; exactly zero is '0', so that it is not taken for a rounded figure."""
    if value is None:
        return MISSING
    return "0" if value == 0 else "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def figure(value: float | None, spread: float | None = None) -> str:
    """Three decimals below 10, fewer above, none of exactly zero; the standard deviation where there is one.

    Examples:
        >>> from monge.viz.numbers import figure
        >>> figure(1.4531), figure(36.338), figure(1.45, 0.0123), figure(84744.2), figure(0)
        ('1.453', '36.34', '1.450 ± 0.012', '84,744', '0')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = 3 if abs(value) < 9.9995 else 2 if abs(value) < 99.995 else 1 if abs(value) < 999.95 else 0
    return f"{value:,.{decimals}f}" + ("" if spread is None else f" ± {spread:,.{decimals}f}")


def difference(interval: dict[str, float] | None, decimals: int = 4) -> str:
    """A difference with its sign, and the confidence interval around it.

    Examples:
        >>> from monge.viz.numbers import difference
        >>> difference({"mean": -0.0534, "low": -0.0601, "high": -0.0467})
        '-0.0534 [-0.0601, -0.0467]'
    """
    if interval is None:
        return MISSING
    mean, low, high = (f"{interval[name]:+.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def increase(value: float | None) -> str:
    """A difference with its sign, four decimals."""
    return MISSING if value is None else f"{value:+.4f}"


def small(value: float | None) -> str:
    """A figure of any size, to two digits."""
    return MISSING if value is None else f"{value:.2g}"


def memory(value: float | None) -> str:
    """Bytes in binary megabytes."""
    return MISSING if value is None else f"{value / 2**20:,.0f} MiB"


def count(value: float | None) -> str:
    """A count, with one decimal where a mean over seeds is not whole."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """A share in percent; exactly zero is '0'."""
    if value is None:
        return MISSING
    return "0" if value == 0 else "<0.1 %" if value < 5e-4 else f"{100 * value:.1f} %"


def milliseconds(value: float | None) -> str:
    """Two decimals below ten, one below a hundred, then none."""
    if value is None:
        return MISSING
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def rate(value: float | None) -> str:
    """A number per second, with one decimal below a hundred."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def millions(value: float | None) -> str:
    """A large count in millions."""
    if value is None:
        return MISSING
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds.

    Examples:
        >>> from monge.viz.numbers import duration
        >>> duration(59.6), duration(125), duration(7260)
        ('1 min 00 s', '2 min 05 s', '2 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )


def enumeration(words: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
