"""Checks of options: each takes name=value and raises a ValueError that says what is allowed."""

from __future__ import annotations

from typing import Any


def check_choice(**named: tuple[Any, tuple[Any, ...]]) -> None:
    """Every option, given as name=(value, allowed values), must be one of those allowed."""
    for name, (value, allowed) in named.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_not_negative(**named: float) -> None:
    """Every option must be finite and not negative."""
    for name, value in named.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_positive(**named: float) -> None:
    """Every option must be finite and above 0."""
    for name, value in named.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")


def check_at_least_one(**named: float) -> None:
    """Every option must be finite and at least 1."""
    for name, value in named.items():
        if not 1 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and at least 1, got {value!r}")


def check_share(**named: float) -> None:
    """Every option must lie in [0, 1): the share of an old value that stays."""
    for name, value in named.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
