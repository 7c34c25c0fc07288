"""How a router is spelled: a name, and after a colon options that differ from its defaults.

ssr                          the defaults
ssr:p=0.05,carry=True        options, as its class names them (`monge.routing.make_router`)
switch:capacity_factor=1.0   of the layer, where the router has no such option: it drops what is beyond
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

DENSE = "dense"
"""The baseline's name among the routers: transformers' own MLP with the active FLOPs of the MoE."""

_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router of an experiment.

    Attributes:
        text: as it was spelled; the name of its runs in every record and table.
        name: of `monge.routing.ROUTERS`, or "dense".
        options: keyword arguments.
    """

    text: str
    name: str
    options: dict[str, Any]

    @property
    def file_name(self) -> str:
        """The text with characters that every file system takes; the plain name without options."""
        return re.sub(r"[^\w.+-]", "_", self.text)


def parse_router(text: str) -> RouterSpec:
    """Read ``NAME`` or ``NAME:OPTION=VALUE,...``; values are True, False, None, numbers or words.

    Raises:
        ValueError: the spelling is none of these.

    Examples:
        >>> from monge.lab.routers import parse_router
        >>> parse_router("ssr:p=.05,carry=True").options
        {'p': 0.05, 'carry': True}
        >>> parse_router("maxscore:gates=soft_topk").options
        {'gates': 'soft_topk'}
    """
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        option, equals, value = (word.strip() for word in part.partition("="))
        if not (option.isidentifier() and equals and value) or option in options:
            what = "is given twice" if option in options else "is not of the form OPTION=VALUE"
            raise ValueError(
                f"routers: {part!r} in {text!r} {what}; write for example ssr:p=0.05,carry=True."
            )
        options[option] = _value(value)
    if name == DENSE and options:
        raise ValueError(f"routers: {DENSE!r} has no router and so no options, got {text!r}.")
    return RouterSpec(text, name, options)


def _value(word: str) -> Any:
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word
