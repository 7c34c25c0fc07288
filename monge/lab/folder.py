"""The output folder's ``config.json``: written before the first step, and the same at every resumption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monge.lab.presets import CompareConfig
from monge.lab.tokenizer import Corpus, load_corpus, load_tokenizer
from monge.workspace.machine import machine, versions
from monge.workspace.text import Domain
from monge.workspace.writing import write_atomic, write_json

OWN_FILES = ("tokenizer.json", "records.jsonl", "summary.json")


def open_folder(out: Path, config: CompareConfig, domains: Sequence[Domain]) -> Corpus:
    """The experiment's tokens; `out` becomes its folder, or is the folder of the same experiment already.

    Raises:
        ValueError: `out` holds an experiment with other settings or text; the message names what differs.
    """
    path, tokenizer = out / "config.json", out / "tokenizer.json"
    if path.exists():
        stored = _read(path)
        _check_same(out, stored, config)
        corpus = load_corpus(domains, config, load_tokenizer(tokenizer) if tokenizer.exists() else None)
        _check_text(out, stored, corpus)
    else:
        _check_free(out)
        corpus = load_corpus(domains, config)
        write_json(path, _description(config, corpus))
    if not tokenizer.exists():  # after config.json: what lies here from now on is this experiment's
        write_atomic(tokenizer, corpus.tokenizer.to_str().encode())
    return corpus


def _check_free(out: Path) -> None:
    taken = [name for name in OWN_FILES if (out / name).exists()]
    if taken:
        raise ValueError(
            f"{out} holds {' and '.join(taken)} of something else (there is no config.json beside): "
            "name another folder with --out."
        )


def _check_text(out: Path, stored: dict[str, Any], corpus: Corpus) -> None:
    if stored["data"]["digest"] != corpus.digest:
        raise ValueError(
            f"the text has changed since {out} was begun (its tokens differ), so it cannot go on there. "
            "Restore the files, or name another folder with --out."
        )


def _description(config: CompareConfig, corpus: Corpus) -> dict[str, Any]:
    return {
        "command": "compare",
        "preset": config.preset,
        "config": asdict(config),
        "versions": versions(),
        "machine": machine(),
        "data": {
            "domains": corpus.domains,
            "vocab": corpus.tokenizer.get_vocab_size(),
            "note": corpus.note,
            "digest": corpus.digest,
        },
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
        if stored["command"] == "compare" and stored["config"].keys() and stored["data"]["digest"]:
            return stored
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} was not written by `monge compare`: name another folder with --out.")


def _check_same(out: Path, stored: dict[str, Any], config: CompareConfig) -> None:
    wanted = json.loads(json.dumps(asdict(config)))  # tuples become lists, as they were stored
    before = stored["config"]
    names = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(f"{name} (was {before.get(name)}, now {wanted.get(name)})" for name in names)
        raise ValueError(
            f"{out} holds an experiment with other settings: {changes}. Repeat its command to go on with it, "
            "or name another folder with --out."
        )
