"""Which architecture an export takes: chosen by the source and the needs, or forced and checked."""

from __future__ import annotations

from monge.conversion.exporting import needs
from monge.conversion.exporting.structure import Structure
from monge.conversion.exporting.targets import ACTIVATION_NAMES, ARCHITECTURES, CONTINUATIONS, TARGETS


def choose_target(structure: Structure, to: str = "auto") -> str:
    """A name of `TARGETS`.

    ``auto`` takes the first architecture that continues the source's and holds all that the model needs, and
    a Monge checkpoint if there is none; a model without experts stays what it is.

    Raises:
        ValueError: ``to`` is unknown or cannot hold the model; the message says why, and names what can.
    """
    if to not in ("auto", *TARGETS):
        raise ValueError(f"to must be auto or one of {', '.join(TARGETS)}; got {to!r}")
    able = _able(structure)
    if to == "auto":
        return able[0]
    if to in able:
        return to
    raise ValueError(
        f"to={to!r} cannot hold this {structure.model_class}: {_why(structure, to)}. "
        f"Choose to={' or '.join(repr(name) for name in able)}"
    )


def _able(structure: Structure) -> list[str]:
    """The targets that can hold the model, the preferred one first; ``monge`` is always the last."""
    if not structure.moes:
        return ["dense"]
    names = CONTINUATIONS.get(structure.model_class, ())
    if any(shape["activation"] not in ACTIVATION_NAMES for shape in structure.shapes.values()):
        names = ()
    return [name for name in names if structure.needs <= ARCHITECTURES[name].holds] + ["monge"]


def _why(structure: Structure, to: str) -> str:
    if not structure.moes:
        return "none of its FFNs was replaced by experts"
    if to == "dense":
        return "it has experts"
    if to not in CONTINUATIONS.get(structure.model_class, ()):
        return f"{ARCHITECTURES[to].model_class} is built differently"
    return f"it has no place for {'; '.join(sorted(structure.needs - ARCHITECTURES[to].holds))}"


def suited_gates(model_class: str, shared: bool) -> str:
    """The gates to convert a ``model_class`` with, so that its export is exact (`GATE_SCALES`).

    Those of the architecture that continues it, with ``shared`` experts or without: "sigmoid" for GLM-4, else
    "standard".
    """
    for name in CONTINUATIONS.get(model_class, ()):
        if needs.SHARED_EXPERTS in ARCHITECTURES[name].holds or not shared:
            return "sigmoid" if needs.SIGMOID_GATES in ARCHITECTURES[name].holds else "standard"
    return "standard"
