"""Two gloo processes: data parallelism gives the gradient of the whole batch, unused experts included."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from monge.moe import MoE

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
WORLD = 2


def _layer_and_batch():
    torch.manual_seed(3)
    layer = MoE(6, 5, 16, 2, router="topk", shared_hidden=3, dtype=torch.float64)
    return layer, torch.randn(4 * WORLD, 6, dtype=torch.float64)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    layer, x_TH = _layer_and_batch()
    model = DistributedDataParallel(layer)
    for _ in range(2):  # a second step fails if a parameter took no part in the first
        layer.zero_grad()
        model(x_TH[rank::WORLD]).square().mean().backward()
    torch.save({n: p.grad for n, p in layer.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_gradient_is_that_of_the_batch(tmp_path: Path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=WORLD)
    grads = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    layer, x_TH = _layer_and_batch()
    whole = copy.deepcopy(layer)
    whole(x_TH).square().mean().backward()
    loads = layer.router(x_TH).loads
    assert (loads == 0).any(), "the case must hold experts without tokens"
    for name, weight in whole.named_parameters():
        assert torch.equal(grads[0][name], grads[1][name])
        torch.testing.assert_close(grads[0][name], weight.grad, rtol=1e-10, atol=1e-14)
