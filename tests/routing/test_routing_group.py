"""`use_group`: 20 steps in float64 on two ranks with different tokens equal one process with all of them.

Shapes: T tokens of a rank.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from routing_cases import CASES, Layer, build, hidden_states
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import monge
from monge.routing import use_group

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]

RANKS, STEPS, T = 2, 20, 24
MORE = {"ssr_carry": {"p": 0.6}, "switch": {"z_loss": 0.01}}
ALONE = ["topk", "sigmoid", "hash"]  # nothing of theirs crosses the tokens
SHARED = [
    "topk_softmax_gates",  # has a z-loss
    "switch",
    "switch_sequence",
    "switch_global",
    "noisy_topk",
    "lossfree",
    "lossfree_softmax",
    "quantile",
    "prices",
    "prices_raw",
    "sbase",
    "ssr",
    "ssr_carry",
    "ssr_softmax_gates",
]
TOLERANCE = 1e-9


def test_every_case_is_accounted_for():
    per_rank = {"base", "expert_choice", "expert_choice_batch"} | {
        c for c in CASES if c.startswith("maxscore")
    }
    same = {"ssr_rare": "topk", "ssr_noise": "ssr"}
    assert {*ALONE, *SHARED, *per_rank, *same} == set(CASES)


class Chain(nn.Module):
    """Two layers and the summed loss of their valid tokens, auxiliary losses included."""

    def __init__(self, case: str) -> None:
        super().__init__()
        routers = [build(case, layer=layer, seed=4, spread=1.5, **MORE.get(case, {})) for layer in range(2)]
        self.layers = nn.ModuleList(Layer(router) for router in routers).double()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, tokens: int) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return (hidden.square().sum(-1) * mask).sum() / tokens + monge.aux_loss(self)


def batch(step: int, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (sequences, 6, D) and their mask; the ranks' tokens differ in kind and in number."""
    hidden = torch.cat([hidden_states(T // 6, 6, seed=10 * step + rank) for rank in range(RANKS)]).double()
    hidden[: T // 6, :, 0] += 1.0
    mask = torch.rand(RANKS * T, generator=torch.Generator().manual_seed(step)) > 0.2
    mask[T:] &= torch.arange(T) % 3 > 0
    if step == 7:
        mask[T:] = False  # a rank without a valid token
    sequences = slice(part.start // 6, part.stop // 6)
    return hidden[sequences], mask.view(-1, 6)[sequences]


class Noise:
    """In place of ``torch.randn_like``: the same numbers for a token wherever it is."""

    def __init__(self, part: slice) -> None:
        self.part, self.calls = part, 0

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return torch.randn(RANKS * T, like.shape[1], generator=generator, dtype=like.dtype)[self.part]


def train(case: str, part: slice, wrap, group, step_group) -> dict[str, torch.Tensor]:
    model = Chain(case)
    if group is not None:
        use_group(model, group)
    wrapped = wrap(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    own, torch.randn_like = torch.randn_like, Noise(part)
    try:
        for step in range(STEPS):
            wrapped(*batch(step, part), len(range(RANKS * T)[part])).backward()
            optimizer.step()
            optimizer.zero_grad()
            monge.step(model, group=step_group)
    finally:
        torch.randn_like = own
    return {name: value.double() for name, value in model.state_dict().items()}


def _plain(model: nn.Module) -> nn.Module:
    return model


def balanced_work() -> dict[str, tuple]:
    """Routers that assign the tokens of all ranks: their loads here and in all, prices, and an empty call."""
    rank, found = dist.get_rank(), {}
    hidden = hidden_states(48 if rank else 24, seed=rank)
    hidden[:, 0] += 3.0 * (-1) ** rank
    for name in ("maxscore", "base"):
        router = build(name, method="approximate")
        use_group(router, dist.group.WORLD)
        routing = router(hidden)
        none = router(hidden_states(0))  # a call without a token on any rank
        loads = routing.loads.clone()
        dist.all_reduce(loads)
        monge.step(router)
        prices = router.prices.clone() if name == "maxscore" else None
        copied = copy.deepcopy(router)
        assert copied.ranks.group is router.ranks.group
        copied.eval()
        if rank:  # one rank alone: it would wait for the other if anything were exchanged
            copied(hidden)
        found[name] = routing.loads, loads, prices, len(none.indices)
    return found


def work(cases: list[str]) -> dict[str, tuple[dict, dict]]:
    rank = dist.get_rank()
    part = slice(rank * T, (rank + 1) * T)
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    own = dist.new_group()
    return {"balanced": balanced_work()} | {
        case: (
            train(case, part, DistributedDataParallel, own, None),
            train(case, part, DistributedDataParallel, None, alone),
        )
        for case in cases
    }


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(RANKS, work, ALONE + SHARED)


@pytest.mark.parametrize("name", ["maxscore", "base"])
def test_an_assignment_balances_over_all_ranks(name, ranks):
    for found in ranks:
        mine, total, _, none = found["balanced"][name]
        assert total.tolist() == [72 * 2 // 6] * 6
        assert max(mine) > min(mine), "the ranks' own loads are not balanced"
        assert none == 0
    if name == "maxscore":
        first, second = (found["balanced"][name][2] for found in ranks)
        assert torch.equal(first, second)
        assert first.abs().max() > 0


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("case", ALONE + SHARED)
def test_two_ranks_equal_one_process(case, ranks):
    expected = train(case, slice(0, RANKS * T), _plain, None, None)
    moved = distance(expected, {n: v.double() for n, v in Chain(case).state_dict().items()})
    assert moved > 1e-2, "training must have changed something"
    for rank in range(RANKS):
        assert distance(ranks[rank][case][0], expected) <= TOLERANCE
    without = max(distance(ranks[rank][case][1], expected) for rank in range(RANKS))
    if case in SHARED:
        assert without > 1e-6, "the test must notice when the ranks exchange nothing"
    else:
        assert without <= TOLERANCE
