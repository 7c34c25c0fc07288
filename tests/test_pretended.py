"""The pretended device refuses what an accelerator refuses, and takes what it takes."""

from __future__ import annotations

import pytest
import torch
from pretended import DEVICE, pretended_device
from torch import nn


@pytest.fixture
def device():
    with pretended_device() as place:
        yield place


def test_what_comes_of_it_lies_on_it(device):
    x = torch.randn(3, 4).to(device)
    made = [
        x,
        x + 1,
        x[0],
        x.T,
        x.double(),
        x.new_zeros(2),
        torch.empty_like(x),
        torch.arange(3, device=x.device),
    ]
    assert {value.device for value in made} == {DEVICE}
    assert {value.device for value in (x.cpu(), x.to("cpu", torch.float64), torch.ones(2))} == {
        torch.device("cpu")
    }


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: x + y,
        lambda x, y: y.add_(x),
        lambda x, y: torch.zeros(()).add_(x[0, 0]),
        lambda x, y: torch.mm(x, y.T, out=torch.empty(3, 3)),
        lambda x, y: nn.functional.embedding(torch.tensor([1]), x),
    ],
)
def test_both_devices_do_not_meet(device, operation):
    x, y = torch.randn(3, 4).to(device), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="tensors on xpu and on cpu"):
        operation(x, y)


def test_numpy_has_no_part_of_it(device):
    x = torch.randn(3).to(device)
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        x.numpy()
    assert x.cpu().numpy().shape == (3,)


def test_numbers_copies_and_indices_of_the_cpu_are_welcome(device):
    x = torch.zeros(3, 2).to(device)
    x.copy_(torch.ones(3, 2))
    assert (x[torch.tensor([0, 2])] * torch.tensor(2.0)).device == DEVICE


def test_a_copy_is_no_view(device):
    here = torch.zeros(2)
    there = here.to(device)
    there += 1
    assert here.sum() == 0


def test_modules_train_on_it_and_hooks_are_told(device):
    told = []
    layer = nn.Linear(4, 2).to(device)
    out = layer(torch.randn(3, 4).to(device))
    out.register_hook(lambda grad: told.append(grad.device))
    out.square().sum().backward()
    assert told == [DEVICE]
    assert layer.weight.grad.device == DEVICE
