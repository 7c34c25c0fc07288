"""The memory of large gradients: used again once nobody holds it, never while somebody does, given back."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import monge
from monge.moe.compute import memory
from monge.moe.compute.memory import LARGE, Kept, gradient

H, I, E, K, T = 256, 256, 16, 2, 2048  # gradients of 8 and 4 MiB, and rows enough for `sorted`


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """A store of its own, for gradients alone: the buffers of sums are too small."""
    mine = Kept()
    monkeypatch.setattr(memory, "_kept", mine)
    monkeypatch.setattr(sys.modules["monge.moe.compute.slot_sum"], "CHUNK", 1)
    return mine


def arrays_of(kept: Kept) -> list:
    return [memory for arrays in kept._arrays.values() for memory, _ in arrays]


def test_memory_is_used_again_only_when_nobody_looks_at_it(kept):
    weight = torch.empty(LARGE // 4)
    first = gradient(weight, weight.shape)
    place = first.data_ptr()
    view = first.view(2, -1)[1]
    del first
    second = gradient(weight, weight.shape)
    assert second.data_ptr() != place  # the view still looks at it
    del view
    assert gradient(weight, weight.shape).data_ptr() == place
    assert len(arrays_of(kept)) == 2


def test_memory_is_given_back_with_the_last_weight_of_its_size(kept):
    one, two = torch.empty(LARGE // 4), torch.empty(LARGE // 4)
    held = gradient(one, one.shape)
    gradient(two, two.shape)
    del one
    assert len(arrays_of(kept)) == 2
    gone = weakref.ref(arrays_of(kept)[1])
    held.fill_(7.0)
    del two
    assert not kept._arrays
    assert not kept._weights
    assert gone() is None
    assert (held == 7).all()  # what is still in use stays


def test_small_gradients_other_devices_and_deterministic_mode_are_left_to_torch(kept):
    gradient(torch.empty(LARGE // 4 - 1), (LARGE // 4 - 1,))
    gradient(torch.empty(LARGE, device="meta"), (LARGE,))
    torch.use_deterministic_algorithms(True)
    try:
        filled = gradient(torch.empty(LARGE), (LARGE,))
    finally:
        torch.use_deterministic_algorithms(False)
    assert filled.isnan().all()
    assert not kept._arrays


def test_threads_never_share_memory(kept):
    weight = torch.empty(LARGE // 4)

    def work(mark: int) -> bool:
        mine = gradient(weight, weight.shape)
        mine.fill_(mark)
        return bool((mine == mark).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(64)))
    assert len(arrays_of(kept)) <= 4


def make_layer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return monge.MoE(H, I, E, K, router="topk", compute="sorted"), torch.randn(T, H)


def gradients(layer: nn.Module, x_TH: torch.Tensor) -> list[torch.Tensor]:
    weights = list(layer.experts.parameters())
    return list(torch.autograd.grad(layer(x_TH).square().sum(), weights))


def test_gradients_that_are_held_keep_their_values(kept):
    layer, x_TH = make_layer()
    first = gradients(layer, x_TH)
    copies = [grad.clone() for grad in first]
    gradients(layer, -2 * x_TH)
    assert all(torch.equal(a, b) for a, b in zip(first, copies))
    assert len(arrays_of(kept)) == 4
    again = gradients(layer, x_TH)  # into memory that was written before
    assert all(torch.equal(a, b) for a, b in zip(again, copies))
    assert len(arrays_of(kept)) == 4


def test_steps_of_training_and_accumulation_take_no_more_memory(kept):
    layer, x_TH = make_layer()
    for _ in range(3):
        layer(x_TH).square().mean().backward()
        layer.zero_grad()
    assert len(arrays_of(kept)) == 2
    places = {array.ctypes.data for array in arrays_of(kept)}
    layer(x_TH).square().mean().backward()
    once = [p.grad.clone() for p in layer.experts.parameters()]
    layer(x_TH).square().mean().backward()
    assert len(arrays_of(kept)) == 4  # one in .grad, one to be added
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(layer.experts.parameters(), once))
    assert places == {p.grad.data_ptr() for p in layer.experts.parameters()}
    del layer
    gc.collect()
    assert not kept._arrays


def test_all_layers_sum_in_one_buffer_whatever_their_loads(kept, monkeypatch):
    monkeypatch.setattr(sys.modules["monge.moe.compute.slot_sum"], "CHUNK", 2 * LARGE)
    torch.set_num_threads(2)
    layers = [make_layer()[0] for _ in range(2)]
    with torch.no_grad():
        for tokens in (T, 2 * T, T + 77, 3 * T):  # 4, 8, 4.2 and 12 MiB of rows
            x_TH = torch.randn(tokens, H)
            first, second = (layer(x_TH) for layer in layers)
            assert torch.equal(first, second)
    assert [array.nbytes for array in arrays_of(kept)] == [4 * LARGE]
    del layers
    gc.collect()
    assert not kept._arrays
