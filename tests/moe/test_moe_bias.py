"""Biases of the experts and of the layer: every path against the formula, masks, precision, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from monge.moe import MoE
from monge.moe.compute import PATHS

PATH_NAMES = list(PATHS)


def biased(activation="swiglu", dtype=torch.float64, **options) -> MoE:
    """A layer whose weights and biases are all of one size, so that none can be forgotten unseen."""
    sizes = {"dim": 16, "hidden": 8, "num_experts": 5, "top_k": 2, "shared_hidden": 8, **options}
    layer = MoE(**sizes, router="topk", activation=activation, bias=True, dtype=dtype)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer


def formula(layer: MoE, x_TH: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Every expert on every token with its bias, the shared expert with its own, the output's bias once."""
    routing = layer.router(x_TH, mask_T)
    gated = layer.experts.activation == "swiglu"
    proj_in = layer.experts.gate_up_proj if gated else layer.experts.up_proj
    bias = layer.experts.gate_up_proj_bias if gated else layer.experts.up_proj_bias

    def ffn(a_JH, a_J, d_HI):
        pre = F.linear(x_TH, a_JH, a_J)
        if not gated:
            return F.linear(F.gelu(pre, approximate="tanh"), d_HI)
        gate, up = pre.chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, d_HI)

    linear = layer.shared.input_linear
    out_TH = ffn(linear.weight, linear.bias, layer.shared.output_linear.weight) + layer.bias
    for e in range(layer.num_experts):
        gate_T1 = torch.where(routing.indices == e, routing.weights, 0).sum(dim=1, keepdim=True)
        out_TH = out_TH + gate_T1 * ffn(proj_in[e], bias[e], layer.experts.down_proj[e])
    return out_TH if mask_T is None else torch.where(mask_T[:, None], out_TH, 0.0)


def output_and_gradients(function, layer, x, *args) -> list[Tensor]:
    out = function(x, *args)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], weight)]


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
@pytest.mark.parametrize("compute", PATH_NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_layer_is_the_formula(compute, activation, masked):
    layer = biased(activation, compute=compute)
    x = torch.randn(13, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(13) % 3 > 0 if masked else None
    ours = output_and_gradients(layer, layer, x, mask)
    theirs = output_and_gradients(lambda x, m: formula(layer, x, m), layer, x, mask)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compute", PATH_NAMES)
def test_kernel_shapes_in_float32_with_an_unused_expert(compute):
    layer = biased(compute=compute, dtype=torch.float32, num_experts=9)
    x = torch.randn(6, 16, requires_grad=True)
    unused = layer.router(x).loads == 0
    assert unused.any()
    ours = output_and_gradients(layer, layer, x)
    exact = copy.deepcopy(layer).double()
    theirs = output_and_gradients(lambda x: formula(exact, x), exact, x.detach().double().requires_grad_())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    grad = dict(zip((n for n, _ in layer.named_parameters()), ours[2:]))["experts.gate_up_proj_bias"]
    assert (grad[unused] == 0).all()
    assert (grad[~unused] != 0).any(dim=1).all()


@pytest.mark.parametrize("path", PATH_NAMES)
def test_gradcheck(path):
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    a, d = torch.randn(3, 4, 3, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    bias = torch.randn(3, 4, dtype=torch.float64)
    indices = torch.tensor([[0, 1], [1, 2], [2, -1], [1, 0]])
    w = w.masked_fill(indices < 0, 0)
    leaves = [v.requires_grad_() for v in (x, w, a, d, bias)]
    torch.autograd.gradcheck(lambda x, w, a, d, b: PATHS[path](x, indices, w, a, d, "swiglu", b), leaves)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_only_the_bias_is_trained(path):
    layer = biased(compute=path)
    full = torch.autograd.grad(layer(torch.ones(3, 16).double()).sum(), layer.experts.gate_up_proj_bias)[0]
    layer.requires_grad_(False)
    layer.experts.gate_up_proj_bias.requires_grad_()
    layer(torch.ones(3, 16).double()).sum().backward()
    torch.testing.assert_close(layer.experts.gate_up_proj_bias.grad, full)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_operator_is_registered_soundly(path):
    x, w = torch.randn(5, 6).double(), torch.rand(5, 2).double()
    a, d, bias = torch.randn(3, 10, 6).double(), torch.randn(3, 6, 5).double(), torch.randn(3, 10).double()
    for leaf in (x, w, a, d, bias):
        leaf.requires_grad_()
    indices = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]])
    operator = getattr(torch.ops.monge, f"experts_{path}").default
    args = (x, indices, w, a, d, "swiglu", True, True, bias)
    torch.library.opcheck(operator, args, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("compute", PATH_NAMES)
def test_compiles_whole(compute):
    torch._dynamo.reset()
    layer = biased(compute=compute, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 7, 16, requires_grad=True), torch.rand(2, 7) < 0.8
    for a, b in zip(*(output_and_gradients(f, layer, x, mask) for f in (layer, compiled))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compute", PATH_NAMES)
def test_autocast_and_low_precision(compute):
    layer = biased(compute=compute, dtype=torch.float32)
    x = torch.randn(9, 16, requires_grad=True)
    high = output_and_gradients(layer, layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = output_and_gradients(layer, layer, x)
    assert low[0].dtype == torch.bfloat16
    for a, b in zip(low, high):
        assert (a.float() - b).norm() < 0.05 * b.norm()
    whole = copy.deepcopy(layer).bfloat16()
    assert whole(x.bfloat16()).dtype == torch.bfloat16


def test_biases_start_at_zero_and_are_absent_by_default():
    layer = MoE(6, 5, 4, 2, router="topk", activation="gelu", bias=True, shared_hidden=3)
    names = {"bias", "experts.up_proj_bias", "shared.input_linear.bias"}
    assert names < set(layer.state_dict())
    assert all((layer.state_dict()[name] == 0).all() for name in names)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters() if n in names} == {
        "bias": (6,), "experts.up_proj_bias": (4, 5), "shared.input_linear.bias": (3,)
    }  # fmt: skip
    assert not any("bias" in name for name in MoE(6, 5, 4, 2, shared_hidden=3).state_dict())


def test_masked_tokens_give_zero_and_no_gradient():
    layer = biased(capacity_factor=1.0)
    mask = torch.tensor([True, False, True, False])
    x = torch.randn(4, 16, dtype=torch.float64).masked_fill(~mask[:, None], float("nan")).requires_grad_()
    out = layer(x, mask=mask.long())
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], layer(x.detach()[mask]))
    out.sum().backward()
    assert (layer.bias.grad == 2).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
