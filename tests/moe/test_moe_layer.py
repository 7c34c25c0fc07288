"""The layer: what it equals, masks, capacity, precision, checkpointing, construction, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from monge.moe import MoE
from monge.moe.compute import PATHS
from monge.routing import Router, make_router
from monge.routing.types import Routing

COMPUTE = ["auto", *PATHS]


class Fixed(Router):
    """Routes as it is told; equal gates summing to ``scale`` unless gates are given."""

    def __init__(self, indices_TK, num_experts, dim, weights_TK=None, scale=1.0):
        super().__init__(dim, num_experts, indices_TK.shape[1])
        self.indices_TK = indices_TK
        self.weights_TK = (
            torch.full(indices_TK.shape, scale / indices_TK.shape[1]) if weights_TK is None else weights_TK
        )

    def forward(self, hidden, mask=None, token_ids=None):
        logits_TE = hidden.reshape(-1, self.dim).float() @ self.weight.T.float()
        return Routing(self.indices_TK, self.weights_TK, self.num_experts, logits_TE, mask=mask)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(("activation", "gate"), [
    ("swiglu", F.silu), ("geglu", lambda x: F.gelu(x, approximate="tanh")), ("gelu", F.gelu)
])  # fmt: skip
def test_all_experts_on_is_a_dense_ffn(compute, activation, gate):
    """E experts of width I with gate 1 each are one feed-forward network of width E I, cut into pieces."""
    T, E, H, I = 11, 4, 6, 5
    indices_TK = torch.arange(E).repeat(T, 1)
    router = Fixed(indices_TK, E, H, torch.ones(T, E, dtype=torch.float64))
    layer = MoE(H, I, E, E, router=router, activation=activation, compute=compute, dtype=torch.float64)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    w_in = getattr(layer.experts, layer.experts.input_name)
    if activation == "gelu":
        act = gate(x @ w_in.flatten(0, 1).T)
    else:
        act = gate(x @ w_in[:, :I].flatten(0, 1).T) * (x @ w_in[:, I:].flatten(0, 1).T)
    dense = act @ layer.experts.down_proj.transpose(1, 2).flatten(0, 1)
    out = layer(x)
    torch.testing.assert_close(out, dense, rtol=1e-10, atol=1e-10)
    leaves = [x, w_in, layer.experts.down_proj]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, dense))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compute", COMPUTE)
def test_mixtral_loads_and_agrees(compute):
    """transformers' Mixtral block and this layer take each other's weights and give the same numbers."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        router_jitter_noise=0.0,
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ours = MoE(16, 24, 6, 2, router="topk", compute=compute)
    state = {name.replace("gate.", "router.", 1): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(state)
    assert ours.state_dict().keys() == state.keys()
    x = torch.randn(3, 7, 16, requires_grad=True)
    outs = [layer(x) for layer in (ours, theirs)]
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)
    grads = [
        torch.autograd.grad(out.square().sum(), [x, *(dict(layer.named_parameters())[n] for n in names)])
        for out, layer, names in (
            (outs[0], ours, ["router.weight", "experts.gate_up_proj", "experts.down_proj"]),
            (outs[1], theirs, ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]),
        )
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


def test_granite_shared_expert_loads_and_agrees():
    transformers = pytest.importorskip("transformers")
    from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMLP

    theirs = GraniteMoeSharedMLP(
        transformers.GraniteMoeSharedConfig(hidden_size=8, shared_intermediate_size=12)
    )
    layer = MoE(8, 4, 3, 1, router="topk", shared_hidden=12)
    layer.shared.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer.shared(x), theirs(x))
    alone = MoE(8, 4, 3, 1, router="topk")
    alone.load_state_dict({n: v for n, v in layer.state_dict().items() if not n.startswith("shared")})
    torch.testing.assert_close(layer(x), alone(x) + theirs(x))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_masked_tokens_give_zero_and_change_nothing(activation):
    layer = MoE(6, 5, 4, 2, router="topk", activation=activation, shared_hidden=3, capacity_factor=1.0)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    x = torch.randn(2, 3, 6)
    bad = x.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    out = layer(bad, mask=mask)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], layer(x[mask]))
    out.square().sum().backward()
    assert (bad.grad[~mask] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_masked_tokens_take_no_compute():
    """Only rows of valid tokens are kept for the backward: 3 of 12, two slots each."""
    layer = MoE(6, 5, 4, 2, router="topk", compute="sorted")
    rows = []

    def pack(x):
        rows.append(len(x)) if x.dim() == 2 and x.shape[1] == 2 * 5 else None
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(12, 6), mask=torch.arange(12) < 3)
    assert rows == [6]


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 0, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("compute", COMPUTE)
def test_any_leading_shape(shape, compute):
    layer = MoE(6, 5, 4, 2, router="topk", compute=compute, shared_hidden=3)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == shape
    torch.testing.assert_close(out.reshape(-1, 6), layer(x.reshape(-1, 6)))
    out.sum().backward()
    assert x.grad.shape == shape
    assert layer.experts.down_proj.grad is not None


def test_capacity_keeps_the_largest_gates():
    """Five tokens on expert 0, C = ceil(0.8 * 5 / 2) = 2: the largest gate and the first equal one stay."""
    gates = torch.tensor([[0.5], [0.5], [0.9], [0.5], [0.1]])
    indices = torch.zeros(5, 1, dtype=torch.int64)
    capped = MoE(6, 5, 2, 1, router=Fixed(indices, 2, 6, gates), capacity_factor=0.8)
    free = copy.deepcopy(capped)
    free.capacity_factor = None
    x = torch.randn(5, 6)
    kept = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(capped(x), free(x) * kept[:, None])


def test_capacity_counts_valid_tokens():
    """Three valid tokens of six on expert 0 of two, cf 1: C = ceil(3 / 2) = 2, so exactly one is dropped."""
    indices = torch.tensor([[0], [-1], [0], [-1], [0], [-1]])
    gates = torch.tensor([[0.5], [0.0], [0.4], [0.0], [0.3], [0.0]])
    layer = MoE(6, 5, 2, 1, router=Fixed(indices, 2, 6, gates), capacity_factor=1.0)
    out = layer(torch.randn(6, 6), mask=indices[:, 0] == 0)
    assert (out.abs().sum(dim=1) > 0).tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_layer(dtype):
    layer = MoE(6, 5, 4, 2, dtype=dtype, shared_hidden=3)
    out = layer(torch.randn(7, 6, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("compute", COMPUTE)
def test_autocast_computes_low_and_keeps_gates_high(compute):
    layer = MoE(16, 8, 4, 2, router="topk", compute=compute, shared_hidden=8)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    seen = []
    layer.router.register_forward_hook(lambda m, a, routing: seen.append(routing.weights.dtype))
    x = torch.randn(9, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert seen == [torch.float32]
    high = layer(x)
    assert (low.float() - high).norm() < 0.02 * high.norm()
    grads = [torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()]) for y in (low, high)]
    for a, b in zip(*grads):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    layer = MoE(6, 5, 4, 2, router="topk", shared_hidden=3)
    x = torch.randn(8, 6, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    out = checkpoint(layer, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert torch.equal(x.grad, plain)


def test_one_layer_twice_in_a_forward():
    layer = MoE(6, 5, 4, 2, router="topk", dtype=torch.float64)
    other = copy.deepcopy(layer)
    x = torch.randn(8, 6, dtype=torch.float64)
    layer(layer(x)).square().sum().backward()
    other2 = copy.deepcopy(layer)
    other2.zero_grad()
    other2(other(x)).square().sum().backward()
    for tied, a, b in zip(layer.parameters(), other.parameters(), other2.parameters()):
        torch.testing.assert_close(tied.grad, a.grad + b.grad, rtol=1e-12, atol=1e-12)


def test_copies_are_independent():
    layer = MoE(6, 5, 4, 2).eval()
    x = torch.randn(8, 6)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    torch.nn.init.zeros_(twin.experts.down_proj)
    assert layer(x).abs().sum() > 0


def test_meta_construction_and_materialisation():
    with torch.device("meta"):
        under_context = MoE(6, 5, 4, 2, shared_hidden=3)
    by_argument = MoE(6, 5, 4, 2, shared_hidden=3, device="meta")
    real = MoE(6, 5, 4, 2, shared_hidden=3)
    for layer in (under_context, by_argument):
        assert all(p.is_meta for p in layer.parameters())
        layer.to_empty(device="cpu")
        layer.load_state_dict(real.state_dict())
        x = torch.randn(8, 6)
        assert torch.equal(layer(x), real(x))


def test_initialisation_is_that_of_transformers():
    layer = MoE(64, 64, 16, 2, shared_hidden=64)
    for weight in layer.parameters():
        assert abs(float(weight.detach().std()) - 0.02) < 0.002


def test_a_router_of_ones_own():
    layer = MoE(6, 5, 4, 2, router=make_router("topk", dim=6, num_experts=4, top_k=2))
    assert layer(torch.randn(3, 6)).shape == (3, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compute": "fast"},
            "compute must be auto or one of loop, sorted, gemv, grouped_mm, masked; got 'fast'",
        ),
        ({"activation": "tanh"}, "activation must be one of swiglu, geglu, .*; got 'tanh'"),
        ({"capacity_factor": 0.0}, "capacity_factor .* got 0.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor .* got nan"),
        ({"shared_hidden": -1}, "shared_hidden .* got -1"),
        ({"router": "mystery"}, "mystery"),
        ({"router": make_router("topk", dim=5, num_experts=4, top_k=2)}, r"\(5, 4, 2\), the layer \(6, 4"),
        ({"router": Fixed(torch.zeros(1, 2), 4, 6), "router_options": {"seed": 1}}, "router_options"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(6, 5, 4, 2, **options)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 2), (6, 0, 4, 2), (6, 5, 0, 2), (6, 5, 4, 0), (6, 5, 4, 5)])
def test_bad_sizes_are_named(sizes):
    with pytest.raises(ValueError, match=r"(dim|hidden|num_experts|top_k)"):
        MoE(*sizes)


def test_bad_inputs_are_named():
    layer = MoE(6, 5, 4, 2)
    with pytest.raises(ValueError, match=r"dim=6.*\(3, 7\)"):
        layer(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"mask must be \(2, 3\).*\(2, 4\)"):
        layer(torch.randn(2, 3, 6), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"float64.*float32.*autocast"):
        layer(torch.randn(3, 6, dtype=torch.float64))
