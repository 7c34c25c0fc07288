"""What `monge convert` and `monge eval` left on disk, complete or not, and whether runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monge.viz.reading import Record, read_config, read_lines, read_summary

COMMANDS = ("convert", "eval")
HELD_OUT = "held-out"
CONVERTED, DENSE, ORACLE = "converted", "dense", "oracle"


@dataclass(frozen=True)
class Run:
    """The output folder of a conversion or of an evaluation.

    Attributes:
        folder: the folder.
        about: the content of ``config.json``.
        records: the lines of ``records.jsonl`` by kind, in their order.
        summary: the content of ``summary.json``; empty while there is none.
        made_by: ``config.json`` of the conversion that gave the model: that of the run itself, or, for an
            evaluation, the one beside the folder of the evaluated model; empty where there is none.
    """

    folder: Path
    about: Record
    records: dict[str, list[Record]]
    summary: Record
    made_by: Record

    @property
    def command(self) -> str:
        """``convert`` or ``eval``."""
        return str(self.about["command"])

    @property
    def settings(self) -> Record:
        """The fields of its own configuration."""
        return self.about.get("config", {})

    @property
    def method_settings(self) -> Record:
        """The fields of the conversion's configuration, empty where that is not known."""
        return self.made_by.get("config", {})

    @property
    def plan(self) -> Record:
        """The plan of the conversion, empty where that is not known."""
        return self.made_by.get("plan", {})

    @property
    def complete(self) -> bool:
        """Whether the command came to its end."""
        return bool(self.summary)

    @property
    def source(self) -> tuple[str, str]:
        """Name and digest of the dense model."""
        if self.command == "convert":
            source = self.about.get("source", {})
            return str(source.get("name", "")), str(source.get("digest", ""))
        models = self.about.get("models", {})
        return str(models.get("name_dense", "")), str(models.get("dense model", ""))

    @property
    def model(self) -> str:
        """Name of the converted model where it has one of its own."""
        return str(self.about.get("models", {}).get("name", ""))

    @property
    def text(self) -> tuple[list[str], int, int]:
        """Files, tokens and sequence length of the held-out text."""
        files = self.about.get("data", {}).get("files", {})
        name, tokens = ("evaluation", "eval_tokens") if self.command == "convert" else (HELD_OUT, "tokens")
        return files.get(name, []), int(self.settings.get(tokens) or 0), int(self.settings.get("length") or 0)

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """The records of that kind whose fields have those values."""
        return [row for row in self.records.get(kind, []) if fields.items() <= row.items()]

    def quality(self, model: str = CONVERTED, text: str = HELD_OUT) -> Record:
        """The ``eval`` row of that model and text at the model's own number of experts, or an empty one."""
        rows = self.of("eval", model=model, text=text)
        return next((row for row in rows if not row.get("k_offset")), {})


def read_runs(out: Path, beside: Sequence[Path] = ()) -> list[Run]:
    """Read ``out`` and, to be shown beside it, other folders of the same source and evaluation text.

    A folder that is named twice counts once.

    Raises:
        FileNotFoundError: a folder without ``config.json``.
        ValueError: a folder of another command, of another dense model or with other evaluation text.
    """
    folders: dict[Path, Path] = {}
    for folder in (out, *beside):
        folders.setdefault(folder.resolve(), folder)
    first, *others = map(_read, folders.values())
    for other in others:
        _check(first, other)
    return [first, *others]


def _read(folder: Path) -> Run:
    about = read_config(folder)
    command = about.get("command")
    if command not in COMMANDS:
        raise ValueError(
            f"{folder} is of `monge {command}`: only folders of {' and '.join(COMMANDS)} are shown together."
        )
    records: dict[str, list[Record]] = {}
    for row in read_lines(folder):
        records.setdefault(str(row["kind"]), []).append(row)
    summary = read_summary(folder)
    made_by = about if command == "convert" else _conversion_of(about)
    return Run(folder, about, records, summary if isinstance(summary, dict) else {}, made_by)


def _conversion_of(about: Record) -> Record:
    """The configuration of the conversion that wrote the evaluated model, which lies beside its folder."""
    model = about.get("config", {}).get("model")
    try:
        found = read_config(Path(model).parent) if model else {}
    except (OSError, ValueError):
        return {}
    return found if found.get("command") == "convert" else {}


def _check(first: Run, other: Run) -> None:
    (name, digest), (other_name, other_digest) = first.source, other.source
    if digest != other_digest:
        raise ValueError(
            f"{other.folder} converts another dense model, {other_name or 'unnamed'}, than {first.folder}, "
            f"{name or 'unnamed'}: their figures cannot stand in one table. Leave it out of --beside."
        )
    (files, tokens, length), (other_files, other_tokens, other_length) = first.text, other.text
    if (tokens, length) != (other_tokens, other_length):
        raise ValueError(
            f"{other.folder} was evaluated on {other_tokens} tokens in sequences of {other_length}, and "
            f"{first.folder} on {tokens} in sequences of {length}: perplexities of different text cannot "
            "stand in one table. Leave it out of --beside, or measure it again on as many."
        )
    if files != other_files:
        raise ValueError(
            f"{other.folder} was evaluated on other text files than {first.folder}: perplexities of "
            "different text cannot stand in one table. Leave it out of --beside, or measure it again on "
            "that --text."
        )
