"""Float32 products by oneDNN: exact, in training only, and the process's setting is as before."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from path_cases import gradients, problem

from monge.moe.compute import PATHS
from monge.moe.compute import float32_products as products
from monge.moe.compute.float32_products import fast_float32


def test_fast_products_are_exact_and_the_setting_is_restored():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    a, b = torch.randn(2, 300, 300)
    with fast_float32():
        product = a @ b
    assert (product.double() - a.double() @ b.double()).abs().max() < 1e-3  # 0.1 by bfloat16
    assert settings.fp32_precision == before


def test_the_setting_holds_until_the_last_thread_has_left(monkeypatch):
    """The first one in is the first one out; what it found is restored when the second is out, too."""
    monkeypatch.setattr(products, "_exact", lambda: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    entered, leave, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with fast_float32():
            entered.set()
            assert leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with fast_float32():
        leave.set()
        thread.join(10)
        seen.append(settings.fp32_precision)
    assert seen == ["bf16"]
    assert settings.fp32_precision == before


@pytest.mark.parametrize("registers", [True, False])
def test_sorted_takes_them_in_training_alone(registers, monkeypatch):
    """And only where they are faster; the gradients are those of the default products, to rounding."""
    by_expert = sys.modules["monge.moe.compute.sorted"]
    args = problem(T=40, K=2, E=5, H=48, hidden=32, dtype=torch.float32)
    monkeypatch.setattr(by_expert, "MANY_REGISTERS", False)
    expected, entered = gradients(PATHS["sorted"], args), []

    def counted():
        entered.append(True)
        return fast_float32()

    monkeypatch.setattr(by_expert, "fast_float32", counted)
    monkeypatch.setattr(by_expert, "MANY_REGISTERS", registers)
    with torch.no_grad():
        PATHS["sorted"](*args)
    assert not entered
    for ours, theirs in zip(gradients(PATHS["sorted"], args), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(entered) == 2 * registers
