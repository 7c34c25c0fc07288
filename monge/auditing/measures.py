"""Measures of recorded routes, as pure functions of counts and outputs.

Shapes: Q sequences, D domains, E experts, N sampled tokens, H model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

DUPLICATE = 0.05  # relative difference of outputs below which two experts count as one
SHUFFLES = 20


def mutual_information(counts_DE: Tensor) -> float:
    """``sum_de p_de ln(p_de / (p_d p_e))`` in nats, of a table of counts; 0 of an empty one.

    At most ln D and ln E: 0 says that the domain tells nothing about the expert.

    Examples:
        >>> import torch
        >>> from monge.auditing.measures import mutual_information
        >>> round(mutual_information(torch.tensor([[5.0, 0.0], [0.0, 5.0]])), 4)  # ln 2
        0.6931
        >>> mutual_information(torch.tensor([[3.0, 6.0], [1.0, 2.0]]))
        0.0
    """
    counts = counts_DE.double()
    p_DE = counts / counts.sum().clamp(min=1)
    entropy = torch.special.entr
    value = entropy(p_DE.sum(0)).sum() + entropy(p_DE.sum(1)).sum() - entropy(p_DE).sum()
    return max(0.0, round(float(value), 12))


def information_of(loads_QE: Tensor, domains_Q: Tensor, num_domains: int) -> tuple[float, float]:
    """Mutual information of domain and expert, and its mean when sequences are dealt to domains at random.

    The second is what so little text gives by chance. Slots of a sequence are alike, so whole sequences are
    dealt out: `SHUFFLES` times, always the same.
    """

    def table(labels_Q: Tensor) -> Tensor:
        counts = torch.zeros(num_domains, loads_QE.shape[1], dtype=torch.float64)
        return counts.index_add_(0, labels_Q, loads_QE.double())

    generator = torch.Generator().manual_seed(0)
    dealt = [domains_Q[torch.randperm(len(domains_Q), generator=generator)] for _ in range(SHUFFLES)]
    chance = sum(mutual_information(table(labels)) for labels in dealt) / SHUFFLES
    return mutual_information(table(domains_Q)), chance


def output_differences(outputs_ENH: Tensor) -> Tensor:
    """(E, E): ``|y_i - y_j| / max(|y_i|, |y_j|)`` of experts' outputs, infinity on the diagonal.

    Two experts that give zero everywhere are copies of each other: 0.
    """
    flat = outputs_ENH.flatten(1).double()
    norms_E = flat.norm(dim=1)
    larger_EE = torch.maximum(norms_E[:, None], norms_E[None])
    # the difference and not a product of norms: copies must come out as exactly zero
    apart_EE = torch.stack([(flat - one).norm(dim=1) for one in flat])
    relative_EE = torch.where(larger_EE > 0, apart_EE / larger_EE.clamp(min=1e-300), 0.0)
    return relative_EE.fill_diagonal_(torch.inf)


def duplicates_of(differences_EE: Tensor) -> list[tuple[int, int]]:
    """The pairs of experts that differ by less than `DUPLICATE`."""
    pairs = torch.triu(differences_EE < DUPLICATE, diagonal=1).nonzero()
    return [(int(a), int(b)) for a, b in pairs]
