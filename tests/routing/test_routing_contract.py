"""What holds for every router: shapes, masks, empty and single batches, dtypes, state."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from routing_cases import CASES, NOISY, D, E, K, backward, build, check_routing, hidden_states, same_routes

import monge
from monge.routing import ROUTERS, make_router

every = pytest.mark.parametrize("case", CASES)


def test_every_router_of_the_table_is_a_case():
    assert {name for name, _ in CASES.values()} == set(ROUTERS)


@every
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("shape", [(0,), (1,), (37,), (3, 5), (2, 0), (0, 4), (2, 3, 4), ()], ids=str)
def test_any_leading_shape(case, mode, shape):
    router = build(case).train(mode == "train")
    T = torch.Size(shape).numel()
    routing = router(hidden_states(*shape))
    check_routing(routing, router, T)
    monge.step(router)
    check_routing(router(hidden_states(*shape)), router, T)


@every
@pytest.mark.parametrize("top_k", [1, E])
def test_one_expert_and_all_experts(case, top_k):
    router = build(case, top_k=top_k)
    hidden = hidden_states(4, 6).requires_grad_()
    routing = router(hidden)
    check_routing(routing, router, 24)
    if top_k == E:
        assert routing.loads.tolist() == [24] * E
    if top_k == 1 and case not in ("hash", "maxscore_soft_topk"):
        (routing.weights.sum()).backward()  # a gate that is always 1 teaches the router nothing
        assert router.weight.grad.abs().sum() > 1e-3
    monge.step(router)
    check_routing(router(hidden), router, 24)


@every
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_masked_tokens_take_no_part(case, mode):
    """Routes, gradients and statistics are those of the valid tokens alone, even where padding is NaN."""
    router = build(case).train(mode == "train")
    alone = copy.deepcopy(router)
    hidden = hidden_states(40)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(1)) > 0.4
    poisoned = torch.where(mask[:, None], hidden, torch.nan)
    masked = router(poisoned, mask)
    check_routing(masked, router, 40, mask)
    backward(masked.weights.square().sum() + monge.aux_loss(router))
    assert all(
        torch.isfinite(p.grad).all() for p in router.parameters() if p.requires_grad and p.grad is not None
    )
    if mode == "train" and (case in NOISY or case == "maxscore_annealed"):
        return  # the noise of a shorter batch is another; the approximate method samples by position
    expected = alone(hidden[mask])
    backward(expected.weights.square().sum() + monge.aux_loss(alone))
    assert torch.equal(masked.indices[mask], expected.indices)
    torch.testing.assert_close(masked.weights[mask], expected.weights)
    torch.testing.assert_close(monge.aux_loss(router), monge.aux_loss(alone))
    if router.weight.requires_grad:
        torch.testing.assert_close(router.weight.grad, alone.weight.grad, rtol=1e-4, atol=1e-5)
    monge.step(router)
    monge.step(alone)
    for (name, a), b in zip(router.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@every
def test_a_batch_without_a_valid_token_changes_nothing(case):
    router = build(case)
    router(hidden_states(30))
    monge.step(router)
    before = {name: value.clone() for name, value in router.state_dict().items() if "steps" not in name}
    routing = router(hidden_states(12), torch.zeros(12, dtype=torch.bool))
    check_routing(routing, router, 12, torch.zeros(12))
    assert monge.aux_loss(router).item() == 0
    monge.step(router)
    for name, value in before.items():
        assert torch.equal(router.state_dict()[name], value), name


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_do_not_depend_on_autocast(case, dtype):
    router = build(case)
    hidden = hidden_states(24)
    torch.manual_seed(3)
    plain = router(hidden)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        cast = router(hidden)
    assert cast.weights.dtype == cast.logits.dtype == torch.float32
    assert same_routes(plain, cast)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_keeps_its_values_in_another_dtype(case, dtype):
    router = build(case)
    for seed in range(3):
        router(hidden_states(30, seed=seed))
        monge.step(router)
    router(hidden_states(30))  # something collected
    state = {n: b.clone() for n, b in router.named_buffers()}
    router.to(dtype)
    assert router.weight.dtype == dtype
    for name, buffer in router.named_buffers():
        assert buffer.dtype == state[name].dtype, name
        assert torch.equal(buffer, state[name]), name
    monge.step(router)
    routing = router(hidden_states(30).to(dtype))
    check_routing(routing, router, 30)
    backward(routing.weights.sum())
    assert routing.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every
def test_a_state_dict_restores_everything(case):
    router = build(case)
    for seed in range(3):
        router(hidden_states(30, seed=seed))
        monge.step(router)
    buffer = io.BytesIO()
    torch.save(router.state_dict(), buffer)
    buffer.seek(0)
    other = build(case, spread=1.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for mode in (True, False):
        torch.manual_seed(0)
        a = router.train(mode)(hidden_states(40))
        torch.manual_seed(0)
        b = other.train(mode)(hidden_states(40))
        assert same_routes(a, b)
    monge.step(router)
    monge.step(other)
    assert all(torch.equal(a, b) for a, b in zip(router.state_dict().values(), other.state_dict().values()))


@every
def test_a_checkpoint_in_half_precision_loads_as_float32(case):
    router = build(case)
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in router.state_dict().items()}
    router.load_state_dict(half, assign=True)
    assert all(b.dtype in (torch.float32, torch.int64) for b in router.buffers())


@every
def test_built_on_the_meta_device_and_loaded(case):
    router = build(case)
    router(hidden_states(30))
    monge.step(router)
    name, options = CASES[case]
    with torch.device("meta"):
        other = make_router(name, dim=D, num_experts=E, top_k=K, **options)
    other.to_empty(device="cpu").load_state_dict(router.state_dict())
    torch.manual_seed(0)
    a = router(hidden_states(20))
    torch.manual_seed(0)
    assert same_routes(a, other(hidden_states(20)))
    monge.step(other)


@every
def test_copies_after_a_forward(case):
    router = build(case, z_loss=0.1)
    router(hidden_states(20))
    twin = copy.deepcopy(router)
    assert twin.last_aux_loss is None
    monge.step(router)
    monge.step(twin)  # what was collected is copied too
    assert all(torch.equal(a, b) for a, b in zip(router.state_dict().values(), twin.state_dict().values()))


@every
def test_evaluation_changes_no_state_and_collects_nothing(case):
    router = build(case)
    router(hidden_states(30))
    monge.step(router)
    before = {n: v.clone() for n, v in router.state_dict().items()}
    router.eval()
    a = router(hidden_states(30, seed=1))
    b = router(hidden_states(30, seed=1))
    assert same_routes(a, b)
    assert a.aux_loss is None
    with monge.routing.training_routes(router):
        router(hidden_states(30, seed=1))
    assert all(torch.equal(before[n], v) for n, v in router.state_dict().items())
    assert getattr(router, "collected", torch.zeros(1)).abs().sum() == 0


@every
def test_deterministic(case):
    routings = []
    for _ in range(2):
        torch.manual_seed(5)
        routings.append(build(case)(hidden_states(64)))
    assert same_routes(*routings)


@every
def test_no_value_is_read_off_an_accelerator(case, monkeypatch):
    """Meta tensors have no values: a read, which would make an accelerator wait, raises."""
    monkeypatch.setattr("monge.routing.router.full_precision", lambda device: contextlib.nullcontext())
    name, options = CASES[case]
    router = make_router(name, dim=D, num_experts=E, top_k=K, device="meta", **options)
    hidden = torch.randn(2, 10, D, device="meta")
    mask = torch.ones(2, 10, dtype=torch.bool, device="meta")
    for mode in (True, False):
        routing = router.train(mode)(hidden, mask)
        backward(routing.weights.sum() + monge.aux_loss(router))
        monge.step(router)
    assert routing.indices.is_meta
