"""torch.compile sees the whole layer: no graph break, both directions, one graph for all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from monge.moe import Experts, MoE
from monge.moe.compute import PATHS


def compare(layer, compiled, *args):
    """Output and all gradients of the compiled layer equal the eager ones."""
    x = args[0].requires_grad_()
    leaves = [x, *layer.parameters()]
    both = []
    for f in (layer, compiled):
        out = f(*args)
        both.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)])
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("compute", "router"), [("auto", "prices"), *((path, "topk") for path in PATHS)])
def test_one_graph_for_all_lengths(compute, router):
    torch._dynamo.reset()
    layer = MoE(16, 8, 4, 2, router=router, compute=compute, shared_hidden=8, capacity_factor=1.25).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (6, 9, 12, 20):
        compare(layer, compiled, torch.randn(2, T, 16), torch.rand(2, T) < 0.8)
    assert counter.frame_count <= 2  # once for the first length, once for any length


@pytest.mark.parametrize("router", ["topk", "switch", "prices", "expert_choice"])
def test_training_mode_compiles_whole(router):
    torch._dynamo.reset()
    layer = MoE(16, 8, 4, 2, router=router)
    compare(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(24, 16))


@pytest.mark.parametrize("compute", list(PATHS))
def test_who_records_operators_sees_the_experts(compute):
    """Without gradients a path is called directly, but not where its numbers would then be constants."""
    experts = Experts(16, 8, 4, compute=compute).eval()
    indices, weights = torch.arange(8).view(4, 2) % 4, torch.full((4, 2), 0.5)
    with torch.no_grad():
        graph = make_fx(lambda x: experts(x, indices, weights))(torch.randn(4, 16))
        x = torch.randn(4, 16)
        torch.testing.assert_close(graph(x), experts(x, indices, weights), rtol=1e-6, atol=1e-9)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            out = experts(fake.from_tensor(x), indices, weights)
        assert type(out).__name__ == "FakeTensor"
        several = torch.randn(3, 4, 16)
        mapped = torch.func.vmap(lambda x: experts(x, indices, weights))(several)
        torch.testing.assert_close(mapped, torch.stack([experts(x, indices, weights) for x in several]))
    assert any(f"experts_{PATHS[compute].__name__}" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("compute", list(PATHS))
def test_inductor_and_autocast(compute):
    torch._dynamo.reset()
    layer = MoE(16, 8, 4, 2, router="topk", compute=compute, shared_hidden=8)
    compiled = torch.compile(layer, fullgraph=True)
    compare(layer, compiled, torch.randn(3, 7, 16), torch.rand(3, 7) < 0.8)
    x = torch.randn(9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, eager = compiled(x), layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, eager, rtol=2e-2, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("compute", list(PATHS))
def test_experts_export_with_any_length(compute):
    experts = Experts(16, 8, 4, compute=compute)
    T = torch.export.Dim("T", min=2, max=4096)

    def routed(T):
        return torch.randn(T, 16), torch.randint(-1, 4, (T, 2)), torch.rand(T, 2)

    program = torch.export.export(experts, routed(5), dynamic_shapes=({0: T}, {0: T}, {0: T}))
    args = routed(11)
    torch.testing.assert_close(program.module()(*args), experts(*args), rtol=1e-5, atol=1e-9)
