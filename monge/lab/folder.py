"""The output folder of an experiment: its settings, its tokenizer and the tokens they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from monge.lab.presets import CompareConfig
from monge.lab.tokenizer import Corpus, load_corpus, load_tokenizer
from monge.workspace.run import begin_run, check_digest, stored_run
from monge.workspace.text import Domain
from monge.workspace.writing import write_atomic


def open_folder(out: Path, config: CompareConfig, domains: Sequence[Domain]) -> Corpus:
    """The experiment's tokens; `out` becomes its folder, or is the folder of the same experiment already.

    Raises:
        ValueError: `out` holds an experiment with other settings or text; the message names what differs.
    """
    tokenizer = out / "tokenizer.json"
    stored = stored_run(out, "compare", asdict(config))
    if stored is not None:
        corpus = load_corpus(domains, config, load_tokenizer(tokenizer) if tokenizer.exists() else None)
        check_digest(out, "text", stored["data"]["digest"], corpus.digest)
    else:
        corpus = load_corpus(domains, config)
        data = {
            "domains": corpus.domains,
            "vocab": corpus.tokenizer.get_vocab_size(),
            "note": corpus.note,
            "digest": corpus.digest,
        }
        begin_run(out, "compare", asdict(config), preset=config.preset, data=data)
    if not tokenizer.exists():  # after config.json: what lies here from now on is this experiment's
        write_atomic(tokenizer, corpus.tokenizer.to_str().encode())
    return corpus
