"""The model tests that transformers ships for models of others: `ModelTesterMixin`.

They are in its source distribution, which the make targets unpack beside the environment. The mixins for
generation and export are not in it; empty ones stand in for them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(sys.prefix) / "transformers_tests"
MISSING = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}


def model_tester_mixin() -> Any:
    """The class `ModelTesterMixin` of the installed version's tests."""
    package = _module(FOLDER.name, [str(FOLDER)])
    for path, mixin in MISSING.items():
        parent, name = path.split(".")
        _module(f"{package}.{parent}", [])
        setattr(sys.modules[_module(f"{package}.{parent}.{name}")], mixin, type(mixin, (), {}))
    return importlib.import_module(f"{package}.test_modeling_common").ModelTesterMixin


def _module(name: str, path: list[str] | None = None) -> str:
    module = ModuleType(name)
    if path is not None:
        module.__path__ = path
    sys.modules[name] = module
    return name
