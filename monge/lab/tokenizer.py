"""A byte-level BPE tokenizer trained on the experiment's own training text, and the tokens of both parts.

Shapes: N windows, S context (tokens of a sequence).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monge.lab.config import CompareConfig, ExperimentConfig
from monge.lab.examples import Examples, window_examples
from monge.lab.text_corruptions import loss_increases
from monge.workspace.text import Domain, Span, read_sample

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"

# More bytes than a token of a small vocabulary has (English: 2.6 at 1024 tokens, 3.7 at 8192), so that
# excerpts of this size fill the token budget.
BYTES_PER_TOKEN = 6


@dataclass(frozen=True)
class Corpus:
    """The experiment's tokens, and where they come from.

    Attributes:
        train_NS: (N, S + 1) int64, training windows; each begins with the last token of the one before it.
        val_NS: (N, S + 1) int64, validation windows, in a fixed shuffled order, so that batches mix domains.
        tokenizer: the tokenizer that made them.
        domains: name, train_files, val_files, train_tokens and val_tokens of every domain.
        note: what is unusual about the split, or an empty string.
        val_domain_N: (N,) int64, the domain of each validation window, by its place in ``domains``.
    """

    train_NS: Tensor
    val_NS: Tensor
    tokenizer: Tokenizer
    domains: list[dict]
    note: str
    val_domain_N: Tensor

    halved = 1

    @property
    def train(self) -> Examples:
        """Windows as inputs and next tokens."""
        return window_examples(self.train_NS)

    @property
    def val(self) -> Examples:
        """Windows as inputs and next tokens."""
        return window_examples(self.val_NS, self.val_domain_N)

    @property
    def domain_names(self) -> list[str]:
        """The globs or packages."""
        return [domain["name"] for domain in self.domains]

    @property
    def tokens_per_example(self) -> int:
        """The context."""
        return self.train_NS.shape[1] - 1

    @property
    def about(self) -> dict[str, Any]:
        """What ``config.json`` tells of the data."""
        return {
            "domains": self.domains,
            "vocab": self.tokenizer.get_vocab_size(),
            "note": self.note,
            "digest": self.digest,
        }

    @cached_property
    def begins_V(self) -> Tensor:
        """(V,) bool, whether a token begins with the space or line break before a word."""
        begins_V = torch.zeros(self.tokenizer.get_vocab_size(), dtype=torch.bool)
        for token, index in self.tokenizer.get_vocab().items():
            begins_V[index] = token.startswith(("Ġ", "Ċ"))  # how byte-level BPE writes them
        return begins_V

    def robustness(self, model: nn.Module, config: ExperimentConfig) -> dict[str, Any]:
        """``corrupted``: by how much the loss rises under each corruption and share."""
        return {"corrupted": loss_increases(model, self.val_NS, self.begins_V, config)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tokens: the same on resumption unless the files have changed."""
        sha = hashlib.sha256()
        for tokens in (self.train_NS, self.val_NS):
            sha.update(tokens.contiguous().numpy().tobytes())
        return sha.hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`.

    Raises:
        ValueError: the file is damaged.
    """
    library = _library()
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is no tokenizer ({error}). Delete it, and it is made again.") from error


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of `vocab` tokens: 256 bytes, the end of text, the most frequent merges of `texts`.

    The same texts give the same tokenizer. Text with too few distinct words gives fewer merges.
    """
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_corpus(
    domains: Sequence[Domain], config: CompareConfig, tokenizer: Tokenizer | None = None, *, note: str = ""
) -> Corpus:
    """Tokens for one experiment: `config.tokens` of training text and `config.val_tokens` of validation.

    The domains share both budgets equally, as far as their text reaches. Without a `tokenizer`, one is
    trained on the sampled training text. ``note`` is added to the corpus'.

    Raises:
        ValueError: a part is shorter than two sequences.
    """
    train_quota, val_quota = (-(-tokens // len(domains)) for tokens in (config.tokens, config.val_tokens))
    train_texts = [read_sample(domain.train, train_quota * BYTES_PER_TOKEN) for domain in domains]
    if tokenizer is None:
        tokenizer = train_tokenizer((text for texts in train_texts for text in texts), config.vocab)
    train = [_encode(tokenizer, texts, train_quota) for texts in train_texts]
    val = [
        _encode(tokenizer, read_sample(domain.val, val_quota * BYTES_PER_TOKEN), val_quota)
        for domain in domains
    ]
    # The order is a property of the data, not of a seed: every run is evaluated on the same batches.
    order = torch.Generator().manual_seed(0)
    val_NS, domain_N = _windows(val, config.context, "validation")
    order_N = torch.randperm(len(val_NS), generator=order)
    return Corpus(
        train_NS=_windows(train, config.context, "training")[0],
        val_NS=val_NS[order_N],
        val_domain_N=domain_N[order_N],
        tokenizer=tokenizer,
        domains=[
            {
                "name": domain.name,
                "train_files": _names(domain.train),
                "val_files": _names(domain.val),
                "train_tokens": len(train_ids),
                "val_tokens": len(val_ids),
            }
            for domain, train_ids, val_ids in zip(domains, train, val)
        ],
        note="; ".join(filter(None, (*(domain.note for domain in domains), note))),
    )


def _encode(tokenizer: Tokenizer, texts: Sequence[str], quota: int) -> list[int]:
    """At most `quota` tokens: every text gives the same share of its own tokens, then an end of text."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    share = min(1.0, quota / max(1, sum(len(ids) + 1 for ids in encoded)))
    end = tokenizer.encode(END_OF_TEXT).ids
    tokens: list[int] = []
    for ids in encoded:
        tokens += ids[: round(len(ids) * share)]
        tokens += end
    return tokens


def _windows(parts: Sequence[Sequence[int]], context: int, what: str) -> tuple[Tensor, Tensor]:
    """(N, S + 1): each part cut into windows that overlap by the one token to be predicted last; (N,)
    parts."""
    windows = {
        part: torch.tensor(tokens).unfold(0, context + 1, context)
        for part, tokens in enumerate(parts)
        if len(tokens) > context
    }
    if sum(map(len, windows.values())) < 2:
        raise ValueError(
            f"the {what} text has {sum(map(len, parts))} tokens, fewer than two sequences of {context}: "
            "name more or longer files, or lower context."
        )
    parts_N = [torch.full((len(windows_NS),), part) for part, windows_NS in windows.items()]
    return torch.cat(list(windows.values())), torch.cat(parts_N)


def _names(spans: Sequence[Span]) -> list[str]:
    return [span.name for span in spans]


def _library():
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError("the lab's tokenizer needs `pip install 'monge[lab]'`.") from error
    return tokenizers
