"""How far an engine's greedy tokens are those of transformers.

Engines add in another order, so they may part from transformers where its two best tokens are all but equally
likely, and only there: from then on they write different texts, and nothing can be compared.

Shapes: P tokens of the prompt, T tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIE = 0.05
"""Nats between the two best tokens, below which either may be chosen."""


@dataclass(frozen=True)
class Agreement:
    """Attributes:
    length: tokens before the first that differs.
    count: tokens compared.
    margin: nats between transformers' two best tokens where the first differs; None where none does.
    """

    length: int
    count: int
    margin: float | None

    @property
    def holds(self) -> bool:
        """Whether all tokens are equal, or equal up to a tie."""
        return self.margin is None or self.margin < TIE

    def __str__(self) -> str:
        parted = "" if self.margin is None else f", parted at {self.margin:.3f} nats"
        return f"{self.length} of {self.count} tokens{parted}"


def agreement(logits_TV: Tensor, tokens: Sequence[int]) -> Agreement:
    """Compare ``tokens`` with the greedy choices of ``logits_TV``, those of transformers after each prefix.

    Examples:
        >>> logits_TV = torch.tensor([[2.0, 0.0], [0.0, 0.01], [5.0, 0.0]])
        >>> print(agreement(logits_TV, [0, 0, 0]))
        1 of 3 tokens, parted at 0.010 nats
    """
    if len(logits_TV) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens, but logits for {len(logits_TV)}: give a row for each token")
    for t, token in enumerate(tokens):
        if int(logits_TV[t].argmax()) != token:
            best, second = logits_TV[t].double().topk(2).values.tolist()
            return Agreement(t, len(tokens), best - second)
    return Agreement(len(tokens), len(tokens), None)


@torch.no_grad()
def agreements(model: Any, answers: Sequence[dict[str, list[int]]]) -> list[Agreement]:
    """Each answer ({"prompt": ids, "tokens": ids}) beside ``model``, of transformers, on the same prefixes.

    Up to the first token that differs these are the prefixes of transformers' own greedy text.
    """
    found = []
    for answer in answers:
        start = len(answer["prompt"])
        ids = torch.tensor([answer["prompt"] + answer["tokens"]])
        found.append(agreement(model(input_ids=ids).logits[0, start - 1 : -1], answer["tokens"]))
    return found
