"""Every router in its layer on another device than the CPU: a pretended one, and an accelerator."""

from __future__ import annotations

import contextlib

import pytest
import torch
from pretended import pretended_device
from routing_cases import BATCH, CASES, NOISY, D, E, K

from monge import MoE


def layer_of(case: str) -> MoE:
    """With weights that set tokens and experts apart."""
    name, options = CASES[case]
    torch.manual_seed(5)
    layer = MoE(D, 16, E, K, router=name, router_options=options)
    with torch.no_grad():
        layer.router.weight.mul_(20)
    return layer


def step_of(layer: MoE, device: torch.device | str) -> list[torch.Tensor]:
    """Outputs of a training step and of evaluation, and all gradients, back on the CPU."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 24, D, generator=generator)
    mask = torch.rand(2, 24, generator=generator) < 0.9
    ids = torch.randint(50, (2, 24), generator=generator)
    layer = layer.to(device)
    x, mask, ids = (value.to(device) for value in (x, mask, ids))
    out = layer(x, mask, ids)
    out.square().sum().backward()
    layer.eval()
    with torch.no_grad():
        found = [out, layer(x, mask, ids)]
    found += [p.grad for p in layer.parameters() if p.grad is not None]
    return [value.detach().cpu() for value in found]


@pytest.mark.parametrize("case", sorted(CASES.keys() - NOISY))
def test_on_a_pretended_device_nothing_meets_the_cpu(case):
    expected = step_of(layer_of(case), "cpu")
    with pretended_device() as device:
        found = step_of(layer_of(case), device)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", sorted(CASES))
def test_on_an_accelerator_the_layer_is_that_of_the_cpu(case):
    device = torch.accelerator.current_accelerator()
    found = step_of(layer_of(case), device)
    if case in NOISY:  # from another generator
        assert all(value.isfinite().all() for value in found)
        return
    for a, b in zip(found, step_of(layer_of(case), "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@contextlib.contextmanager
def no_waiting():
    """Within it reading anything from a CUDA device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA tells who waits for it")
@pytest.mark.parametrize(
    ("case", "compute"),
    [(case, "masked") for case in sorted(CASES.keys() - BATCH)] + [("topk", "grouped_mm"), ("topk", "auto")],
)
def test_the_host_does_not_wait_for_the_device(case, compute):
    """A step of training in bfloat16: all is queued, forward and backward, and nothing is read back."""
    layer = layer_of(case).to("cuda", torch.bfloat16)
    layer.experts.compute = compute
    x = torch.randn(256, D, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(50, (256,), device="cuda")
    step = lambda: layer(x, token_ids=ids).float().square().mean().backward()  # noqa: E731
    step()
    torch.cuda.synchronize()
    with no_waiting():
        step()


@pytest.mark.gpu
def test_under_autocast_the_gates_stay_float32():
    device = torch.accelerator.current_accelerator()
    layer = layer_of("topk").to(device)
    x = torch.randn(64, D, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer.router(x).weights.dtype == torch.float32
        out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = layer(x)
    assert (out.float() - exact).norm() / exact.norm() < 0.02
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["topk", "prices"])
def test_compiled_for_an_accelerator_the_layer_is_the_same(case):
    device = torch.accelerator.current_accelerator()
    layer = layer_of(case).to(device, torch.bfloat16).eval()
    x = torch.randn(64, D, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = torch.compile(layer, fullgraph=True)(x), layer(x)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
