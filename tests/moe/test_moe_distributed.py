"""Two gloo processes: data parallelism gives the gradient of the whole batch, unused experts included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.nn.parallel import DistributedDataParallel

from monge.moe import MoE

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
WORLD = 2


def _layer_and_batch():
    torch.manual_seed(3)
    layer = MoE(6, 5, 16, 2, router="topk", shared_hidden=3, dtype=torch.float64)
    return layer, torch.randn(4 * WORLD, 6, dtype=torch.float64)


def _gradients() -> dict[str, torch.Tensor]:
    layer, x_TH = _layer_and_batch()
    model = DistributedDataParallel(layer)
    for _ in range(2):  # a second step fails if a parameter took no part in the first
        layer.zero_grad()
        model(x_TH[dist.get_rank() :: WORLD]).square().mean().backward()
    return {n: p.grad for n, p in layer.named_parameters()}


def test_data_parallel_gradient_is_that_of_the_batch():
    grads = on_ranks(WORLD, _gradients)
    layer, x_TH = _layer_and_batch()
    whole = copy.deepcopy(layer)
    whole(x_TH).square().mean().backward()
    loads = layer.router(x_TH).loads
    assert (loads == 0).any(), "the case must hold experts without tokens"
    for name, weight in whole.named_parameters():
        assert torch.equal(grads[0][name], grads[1][name])
        torch.testing.assert_close(grads[0][name], weight.grad, rtol=1e-10, atol=1e-14)
