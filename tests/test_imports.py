"""The house: a room imports only rooms to its left, lazy imports included, and viz is a leaf."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "monge"

# Who may import whom. A room also imports itself. `lab`, `conversion` and `speed` never import each other.
CHAIN = ["ot", "routing", "moe", "monitor", "hf", "auditing"]
ALLOWED = {room: set(CHAIN[:i]) for i, room in enumerate(CHAIN)}
FILES_ROOM = "workspace"  # knows no other room; the rooms that keep output folders may use it
ALLOWED |= {
    FILES_ROOM: set(),
    "conversion": {*CHAIN, FILES_ROOM},
    "lab": {*CHAIN, FILES_ROOM},
    "speed": {*CHAIN, FILES_ROOM},
    "viz": set(),
    "cli": {*CHAIN, FILES_ROOM, "conversion", "lab", "speed", "viz"},
    "__main__": {"cli"},
    "__init__": {*CHAIN, "conversion", "lab"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source: str, package: list[str]) -> set[str]:
    """The rooms of monge that ``source`` imports anywhere; ``package`` are the parts of its own package."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            # `from monge import ot` names the room only in the imported name.
            modules = [[*module, alias.name] for alias in node.names]
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("monge.")
        ):
            modules = [node.value.split(".")]  # importlib.import_module("monge.lab") and tables of lazy names
        else:
            continue
        rooms |= {parts[1] for parts in modules if parts[0] == "monge" and len(parts) > 1}
    known = set(ALLOWED)
    return rooms & known


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_to_its_left(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is not a room of design: add it here if it should be"
    package = ["monge", *path.relative_to(PACKAGE).parts[:-1]]
    strangers = imported_rooms(path.read_text(), package) - ALLOWED[room] - {room}
    assert not strangers, f"{path.relative_to(PACKAGE)} imports {sorted(strangers)}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    from monge.lab import compare", {"lab"}),
        ("from .. import moe", {"moe"}),
        ("import importlib\nimportlib.import_module('monge.viz')", {"viz"}),
        ("from monge.ot import sinkhorn", {"ot"}),
        ("import torch", set()),
    ],
)
def test_the_check_sees_every_kind_of_import(source, found):
    assert imported_rooms(source, ["monge", "routing"]) == found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_fits_on_a_few_screens(path):
    assert len(path.read_text().splitlines()) <= 300
