"""DDP and FSDP2 with gradient accumulation, checkpointing and mixed precision, on two gloo processes.

Shapes: T tokens of a rank in a micro-batch, H model width.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import monge
from monge.routing import use_group

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]

RANKS, STEPS, MICRO, T, H = 2, 20, 2, 12, 6
ROUTERS = {"prices": {}, "ssr": {"p": 0.6, "carry": True}, "switch": {"z_loss": 1e-3}, "lossfree": {}}
WRAPPERS = ["ddp", "fsdp"]
MIXED = ["prices", "ssr"]  # also trained in bfloat16


class Model(nn.Module):
    """Two blocks, the second under activation checkpointing."""

    def __init__(self, router: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(
            monge.MoE(H, 8, 4, 2, router=router, router_options={"layer": i, "seed": 2, **ROUTERS[router]})
            for i in range(2)
        )
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, x_TH: Tensor) -> Tensor:
        x_TH = x_TH + self.blocks[0](x_TH)
        return x_TH + checkpoint(self.blocks[1], x_TH, use_reentrant=False)


def micro_batch(step: int, micro: int, rank: int) -> Tensor:
    """Tokens whose kind differs from rank to rank."""
    seed = 100 * step + 10 * micro + rank
    x_TH = torch.randn(T, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_TH[:, rank] += 1.0
    return x_TH


def train(model: nn.Module, parallel: nn.Module, parts: list[int], step_group=None) -> None:
    """Steps of two micro-batches; the loss is the mean over tokens, here of the ranks ``parts``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    dtype = next(model.parameters()).dtype
    for step in range(STEPS):
        for micro in range(MICRO):
            x_TH = torch.cat([micro_batch(step, micro, rank) for rank in parts]).to(dtype)
            if isinstance(parallel, DistributedDataParallel):
                parallel.require_backward_grad_sync = micro == MICRO - 1
            out_TH = parallel(x_TH)
            loss = out_TH.to(torch.promote_types(out_TH.dtype, torch.float32)).square().mean()
            ((loss + monge.aux_loss(model)) / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
        monge.step(model, group=step_group)


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for name, v in state.items()}


def wrap(model: nn.Module, wrapper: str, **options) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def work() -> dict:
    warnings.simplefilter("error", RuntimeWarning)  # nothing may say that monge.step was forgotten
    rank, own, found = dist.get_rank(), dist.new_group(), {}
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    for router in ROUTERS:
        for wrapper in WRAPPERS:
            model = Model(router).double()
            use_group(model, own)
            train(model, wrap(model, wrapper), [rank])
            found[router, wrapper] = whole(model)
        model = Model(router).double()
        train(model, wrap(model, "ddp"), [rank], alone)  # nothing of routing crosses the ranks
        found[router, "without"] = whole(model)
        for wrapper in WRAPPERS if router in MIXED else ():
            model = Model(router)
            use_group(model, own)
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            parallel = wrap(model, wrapper, **({"mp_policy": policy} if wrapper == "fsdp" else {}))
            with torch.autocast("cpu", torch.bfloat16, enabled=wrapper == "ddp"):
                train(model, parallel, [rank])
            found[router, wrapper, "mixed"] = whole(model)
    return found


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(RANKS, work)


def reference(router: str) -> dict[str, Tensor]:
    model = Model(router).double()
    train(model, model, list(range(RANKS)))
    return whole(model)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - value.detach()).abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("router", ROUTERS)
def test_equals_one_process(router, ranks):
    expected = reference(router)
    for found in ranks:
        for wrapper in WRAPPERS:
            assert distance(found[router, wrapper], expected) <= 1e-9, wrapper
        assert distance(found[router, "without"], expected) > 1e-6, "the test must notice a missing exchange"


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("router", MIXED)
def test_mixed_precision_keeps_routers_in_float32_and_ranks_together(router, wrapper, ranks):
    first, second = (found[router, wrapper, "mixed"] for found in ranks)
    expected = reference(router)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.dtype == torch.float32, name
        assert torch.isfinite(value).all()
    start = dict(Model(router).named_parameters())
    moved = distance(expected, start)
    weights = {name: expected[name] for name in start}
    assert distance(first, weights) < 0.25 * moved, "training in bfloat16 must go the same way"
