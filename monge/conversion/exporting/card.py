"""The model card, README.md of an export: what the model is, how to load it, its figures, its provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LOADING = {
    "monge": "import monge\n\nmodel = monge.load(folder)",
    "standard": "from transformers import {0}\n\nmodel = {0}.from_pretrained(folder)",
}


def model_card(
    card: Mapping[str, Any], *, target: str, model_class: str, shape: Mapping[str, Any] | None
) -> str:
    """The card in Markdown.

    Args:
        card: figures and provenance. ``title``, ``license`` and ``base_model`` go to the head; of the others,
            a mapping becomes a table under its name, anything else a row of the last table, of provenance.
        target: a name of `TARGETS`.
        model_class: class of the exported model.
        shape: `describe_moe` of its layers, None if there are no experts.
    """
    tags = ["monge", "moe", "mixture-of-experts"] if shape else ["monge"]
    head: dict[str, Any] = {"library_name": "monge" if target == "monge" else "transformers", "tags": tags}
    head |= {name: str(card[name]) for name in ("license", "base_model") if card.get(name)}
    tables = {name: value for name, value in card.items() if isinstance(value, Mapping) and value}
    used = {"title", "license", *tables}
    provenance = {name: value for name, value in card.items() if name not in used and value is not None}
    if provenance:
        tables["provenance"] = provenance
    loading = LOADING["monge" if target == "monge" else "standard"].format(model_class)
    parts = [
        "---\n" + "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items()) + "\n---",
        f"# {card.get('title') or card.get('base_model') or model_class}",
        _summary(model_class, shape),
        f"```python\n{loading}\n```",
        *(_table(name, rows) for name, rows in tables.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(model_class: str, shape: Mapping[str, Any] | None) -> str:
    if shape is None:
        return f"A dense `{model_class}`, written by Monge."
    shared = f" beside a shared expert of {shape['shared_hidden']}" if shape["shared_hidden"] else ""
    return (
        f"A dense model whose feed-forward layers were divided into experts by Monge; a `{model_class}`. "
        f"Each token uses {shape['top_k']} of {shape['num_experts']} experts of {shape['hidden']} neurons"
        f"{shared}."
    )


def _table(name: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {_words(key)} | {_cell(value)} |" for key, value in rows.items()]
    return f"## {_words(name).capitalize()}\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _words(name: str) -> str:
    return str(name).replace("_", " ").replace("|", "\\|")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|")
