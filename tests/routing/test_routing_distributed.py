"""Data parallelism on two gloo processes: one update from the batch of all ranks and micro-batches."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from routing_cases import Layer, build, hidden_states
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import monge

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]

RANKS, STEPS = 2, 4
CASES = ["prices", "quantile", "lossfree", "maxscore", "ssr_carry", "switch_global"]
# Valid tokens of each micro-batch of each rank; rank 1 has a micro-batch without any.
TOKENS = [[24, 8], [0, 40]]


def model_of(case: str) -> nn.Module:
    more = {"p": 0.6} if case == "ssr_carry" else {}
    return nn.Sequential(*(Layer(build(case, layer=layer, seed=4, **more)) for layer in range(2)))


def batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden_states(40, seed=100 * step + 10 * rank + micro)
    return hidden, torch.arange(40) < TOKENS[rank][micro]


def loss_of(model: nn.Module, layers: nn.Module, step: int, rank: int, micro: int) -> torch.Tensor:
    hidden, mask = batch(step, rank, micro)
    for layer in layers:
        hidden = layer(hidden, mask)
    return (hidden.square().sum(1) * mask).sum() / 40


class Chain(nn.Module):
    """DDP wraps one module with one forward."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, step: int, rank: int, micro: int) -> torch.Tensor:
        return loss_of(self, self.layers, step, rank, micro)


def work() -> dict[str, tuple[dict[str, torch.Tensor], list]]:
    rank = dist.get_rank()
    warnings.simplefilter("error", RuntimeWarning)  # nothing may say that monge.step was forgotten
    results = {}
    for case in CASES:
        model = DistributedDataParallel(Chain(model_of(case)), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        branches = []
        for step in range(STEPS):
            branches.append([getattr(layer.router, "transport", None) for layer in model.module.layers])
            with model.no_sync():
                model(step, rank, 0).backward()
            model(step, rank, 1).backward()
            optimizer.step()
            optimizer.zero_grad()
            monge.step(model)
        results[case] = (model.module.state_dict(), branches)
    return results


def reference(case: str) -> tuple[dict[str, torch.Tensor], list]:
    """One process, the micro-batches of all ranks one after another."""
    model = Chain(model_of(case))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    branches = []
    for step in range(STEPS):
        branches.append([getattr(layer.router, "transport", None) for layer in model.layers])
        for rank in range(RANKS):
            for micro in range(2):
                (model(step, rank, micro) / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
        monge.step(model)
    return model.state_dict(), branches


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(RANKS, work)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_update_of_the_whole_batch(case, ranks):
    (first, first_branches), (second, second_branches) = (rank[case] for rank in ranks)
    expected, expected_branches = reference(case)
    for name in expected:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert first_branches == second_branches == expected_branches
    if case == "ssr_carry":
        assert len({branch for step in expected_branches for branch in step}) == 2
