"""Something better than every router there is? Candidates between them, compared as `monge compare` does.

    python -m benchmarks.router_search [--preset natural | stress] [--routers R ...] [--seeds N] [--out DIR]

Each candidate is known by its name in this process alone. One that wins by more than the interval on both
presets would move into `monge.routing`; what came out is in docs/LOG.md.

Shapes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monge.cli.compare import compare_and_report
from monge.lab.presets import PRESETS
from monge.ot import soft_topk
from monge.routing import ROUTERS, MaxScore, Prices
from monge.routing.assigning import balanced_choice
from monge.routing.gates import annealed_gates, normalised, top_k_of
from monge.routing.router import Batch, Choice, recomputing


class SoftPrices(Prices):
    """Prices choose, the relaxed top-k of ``Z_t - b`` weighs: the gates of the chosen are nearly equal unless
    the token is undecided about them.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, temperature: float = 1.0, **common: Any):
        super().__init__(dim, num_experts, top_k, **common)
        self.temperature = temperature

    def gates(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        relaxed_TE = soft_topk(logits_TE - self.prices, self.top_k, temperature=self.temperature)
        return normalised(relaxed_TE.gather(1, indices_TK))


class AnnealedPrices(Prices):
    """Prices choose, and the gates are MaxScore's annealed ones, of ``softmax(Z_t - b)`` over all experts: as
    they are for the first choice, times a factor falling linearly from ``anneal_from`` to 1 for the others.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *,
        anneal_from: float = 4.0, anneal_steps: int = 300, **common: Any,
    ):  # fmt: skip
        super().__init__(dim, num_experts, top_k, **common)
        self.anneal_from, self.anneal_steps = anneal_from, anneal_steps

    def gates(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        return annealed_gates(
            logits_TE - self.prices,
            indices_TK,
            self.steps,
            start=self.anneal_from,
            duration=self.anneal_steps,
        )


class FlowThenPrices(Prices):
    """MaxScore on the logits, annealed into prices: a training step routes by the exact assignment with a
    probability that falls linearly to 0 over ``flow_steps``, otherwise by the prices, which follow the
    assignment's duals on the former and the margin step on the latter.
    """

    causal_train = False

    def __init__(self, dim: int, num_experts: int, top_k: int, *, flow_steps: int = 500, **common: Any):
        super().__init__(dim, num_experts, top_k, **common)
        self.flow_steps = flow_steps

    @property
    def by_flow(self) -> bool:
        """Whether this step solves the assignment: golden-ratio numbers fill [0, 1] evenly."""
        step = int(self.steps)
        return (step * 0.6180339887498949) % 1 < 1 - step / self.flow_steps

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if not (self.training_route and self.by_flow):
            return super().choose(logits_TE, batch)
        indices_BTK, prices_BE = balanced_choice(logits_TE[None], self.top_k, mask=None)
        indices_TK, prices_E = indices_BTK[0], prices_BE[0]
        if self.collecting and not recomputing():
            self.collect(prices_E, batch)
        gates_TK = (logits_TE - prices_E).gather(1, indices_TK).softmax(dim=1)
        return Choice(indices_TK, gates_TK, prices_E=prices_E)


class TighteningMaxScore(MaxScore):
    """MaxScore on the logits, its capacity falling linearly from ``capacity_from`` to 1 over
    ``capacity_steps``: free to specialise first, balanced later. Evaluated with its prices.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *,
        capacity_from: float = 2.0, capacity_steps: int = 500, **common: Any,
    ):  # fmt: skip
        super().__init__(dim, num_experts, top_k, **common)
        self.capacity_from, self.capacity_steps = capacity_from, capacity_steps
        self.scores, self.eval_prices = "logits", True

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        passed = min(1.0, int(self.steps) / self.capacity_steps)
        self.capacity_factor = self.capacity_from + (1.0 - self.capacity_from) * passed
        return super().choose(logits_TE, batch)


class AdaptivePrices(Prices):
    """Prices with a step size of each layer's own: larger while the proposals keep their direction, smaller
    once they turn back (between .05 and 1; the momentum is its complement).
    """

    move: Tensor
    rate: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, **common: Any):
        super().__init__(dim, num_experts, top_k, **common)
        self.register_state("move", torch.zeros(num_experts))
        self.register_state("rate", torch.tensor(1 - self.momentum))

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        move_E = (mean_E - self.prices).to(self.move.dtype)
        factor = torch.where((move_E * self.move).sum() > 0, 1.1, 0.8)
        self.rate.copy_((factor * self.rate).clamp(0.05, 1.0))
        self.move.copy_(move_E)
        self.blend_prices(mean_E, seen, 1 - float(self.rate))


class RandomPrices(Prices):
    """Prices plus Gumbel noise on the logits that choose in training, falling linearly to none over
    ``noise_steps``: exploration without an auxiliary loss, as noisy top-k but balanced.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *,
        noise: float = 0.5, noise_steps: int = 500, **common: Any,
    ):  # fmt: skip
        super().__init__(dim, num_experts, top_k, **common)
        self.noise, self.noise_steps = noise, noise_steps

    def choose(self, logits_TE: Tensor, batch: Batch) -> Choice:
        if not self.training:
            return super().choose(logits_TE, batch)
        scale = self.noise * (1 - self.steps / self.noise_steps).clamp(min=0)
        gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
        noisy_TE = logits_TE.detach() + scale * gumbel_TE
        prices_E = self.prices.clone()
        indices_TK = top_k_of(noisy_TE - prices_E, self.top_k)
        if self.collecting and not recomputing():
            self.collect(self.statistic(noisy_TE, indices_TK, batch), batch)
        return Choice(indices_TK, self.gates(logits_TE, indices_TK), prices_E=prices_E)


CANDIDATES = {
    "soft_prices": SoftPrices,
    "annealed_prices": AnnealedPrices,
    "flow_then_prices": FlowThenPrices,
    "tightening_maxscore": TighteningMaxScore,
    "adaptive_prices": AdaptivePrices,
    "random_prices": RandomPrices,
}
ROWS = (
    "topk", "prices", "prices:gates=raw", "prices:momentum=0.9", "soft_prices", "annealed_prices",
    "flow_then_prices", "tightening_maxscore", "adaptive_prices", "random_prices",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="natural", choices=("natural", "stress"))
    parser.add_argument("--routers", nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/router_search"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    ROUTERS.update(CANDIDATES)
    config = replace(
        PRESETS[args.preset], routers=tuple(args.routers), threads=args.threads, seeds=args.seeds
    )
    compare_and_report(config, args.out)


if __name__ == "__main__":
    main()
