"""Data of the lab made by hand: windows of random tokens, and a tokenizer that is only a vocabulary."""

from __future__ import annotations

import torch

from monge.lab import CompareConfig
from monge.lab.tokenizer import Corpus


class Vocabulary:
    """Of ``size`` tokens, every third of which begins a word."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab_size(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {("Ġ" if index % 3 == 0 else "") + f"t{index}": index for index in range(self.size)}


def random_windows(config: CompareConfig, count: int = 12) -> torch.Tensor:
    """(count, S + 1) token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab, (count, config.context + 1), generator=generator)


def corpus_of(
    windows_NS: torch.Tensor, config: CompareConfig, domain_N: torch.Tensor | None = None
) -> Corpus:
    """Validated (and, if ever, trained) on these windows; one domain unless told otherwise."""
    if domain_N is None:
        domain_N = torch.zeros(len(windows_NS), dtype=torch.int64)
    domains = [{"name": name} for name in "abc"]
    return Corpus(windows_NS, windows_NS, Vocabulary(config.vocab), domains, "", domain_N)
