"""The output folder of an experiment: its settings, its tokenizer where it has one, and its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monge.lab.config import CompareConfig, ExperimentConfig, VisionConfig
from monge.lab.examples import Data
from monge.lab.images import Images, load_images
from monge.lab.tokenizer import Corpus, load_corpus, load_tokenizer
from monge.workspace.packaged import install_command
from monge.workspace.run import as_stored, begin_run, check_digest, stored_run
from monge.workspace.text import Domain, find_domains, missing_packages
from monge.workspace.writing import write_atomic, write_json

FREE = ("preset", "routers", "seeds")  # settings that may change in a folder: no run depends on them


def find_data(config: ExperimentConfig) -> Sequence[Domain] | Images:
    """What there is of the data that ``config`` names: domains whose text is not yet read, or images.

    Raises:
        ValueError: it is missing or unusable; the message names the remedy.
    """
    if isinstance(config, VisionConfig):
        return load_images(config)
    assert isinstance(config, CompareConfig)
    return find_domains(config.text, config.packages)


def missing_note(config: ExperimentConfig) -> str:
    """Which optional packages the experiment goes on without, and the command that installs them."""
    if not isinstance(config, CompareConfig) or config.text:
        return ""
    missing = missing_packages(config.packages)
    if not missing:
        return ""
    return f"without {' and '.join(missing)}, not installed here (`{install_command(missing)}`)"


def open_folder(out: Path, config: ExperimentConfig, found: Sequence[Domain] | Images) -> Data:
    """The experiment's data; `out` becomes its folder, or is the folder of the same experiment already.

    Which routers are compared, over how many seeds and from which preset may have changed since: runs do not
    depend on it.

    Raises:
        ValueError: `out` holds an experiment with other settings or data; the message names what differs.
    """
    stored = stored_run(out, "compare", asdict(config), free=FREE)
    if isinstance(found, Images):
        _begin(out, config, stored, "set of images", found)
        return found
    assert isinstance(config, CompareConfig)
    tokenizer = out / "tokenizer.json"
    known = load_tokenizer(tokenizer) if stored is not None and tokenizer.exists() else None
    corpus = load_corpus(found, config, known, note=missing_note(config))
    _begin(out, config, stored, "text", corpus)
    if not tokenizer.exists():  # after config.json: what lies here from now on is this experiment's
        write_atomic(tokenizer, corpus.tokenizer.to_str().encode())
    return corpus


def _begin(
    out: Path, config: ExperimentConfig, stored: dict[str, Any] | None, what: str, data: Corpus | Images
) -> None:
    """Write ``config.json``, or check that the data is still that of the run that wrote it."""
    if stored is not None:
        check_digest(out, what, stored["data"]["digest"], data.digest)
        if stored["config"] != (now := as_stored(asdict(config))):  # in what is free
            write_json(out / "config.json", stored | {"config": now})
    else:
        begin_run(out, "compare", asdict(config), preset=config.preset, data=data.about)
