"""The baselines against their formulas: Switch, noisy, BASE, S-BASE, expert choice, hash; the losses."""

from __future__ import annotations

import math

import pytest
import torch
from routing_cases import build, hidden_states
from torch.nn import functional as F

import monge
from monge.routing import load_balance_loss, make_router, z_loss
from monge.routing.hash import mixed
from monge.routing.losses import sequence_balance_loss, squared_cv


def one_hot_loads(indices, num_experts):
    return F.one_hot(indices, num_experts).sum((0, 1)).float()


def test_topk_gates():
    routing = build("topk")(hidden_states(50))
    values, indices = routing.logits.topk(2, dim=1)
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, values.softmax(1))
    raw = build("topk", renormalise=False)(hidden_states(50))
    torch.testing.assert_close(raw.weights, raw.logits.softmax(1).gather(1, raw.indices))


def test_a_bias_is_added_to_the_logits():
    router = build("topk", bias=True)
    router.bias.data[3] = 100.0
    assert (router(hidden_states(20)).indices[:, 0] == 3).all()


def test_logits_are_the_product_in_float32():
    router = build("topk", dtype=torch.bfloat16)
    hidden = hidden_states(20).bfloat16()
    expected = hidden.float() @ router.weight.detach().float().T
    torch.testing.assert_close(router(hidden).logits, expected)


def test_sigmoid_gates():
    routing = build("sigmoid")(hidden_states(50))
    scores = routing.logits.sigmoid().gather(1, routing.indices)
    torch.testing.assert_close(routing.weights, scores / scores.sum(1, keepdim=True))


def test_switch_loss_is_the_formula():
    routing = build("switch", coefficient=0.3)(hidden_states(50))
    shares = one_hot_loads(routing.indices, 6) / 100
    expected = 0.3 * 6 * (shares * routing.logits.softmax(1).mean(0)).sum()
    torch.testing.assert_close(routing.aux_loss, expected)


def test_switch_per_sequence_is_the_mean_over_sequences():
    hidden = hidden_states(3, 16)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[0, 9:] = False
    whole = build("switch", scope="sequence")(hidden, mask).aux_loss
    parts = [build("switch")(hidden[0, :9]), build("switch")(hidden[1]), build("switch")(hidden[2])]
    torch.testing.assert_close(whole, sum(p.aux_loss for p in parts) / 3)


def test_switch_over_the_global_batch_uses_the_shares_of_the_last_step():
    router = build("switch", scope="global", coefficient=1.0)
    routings = [router(hidden_states(t, seed=t)) for t in (20, 60)]
    monge.step(router)
    shares = sum(one_hot_loads(r.indices, 6) for r in routings) / 160
    torch.testing.assert_close(router.shares, shares)
    routing = router(hidden_states(30))
    torch.testing.assert_close(routing.aux_loss, 6 * (shares * routing.logits.softmax(1).mean(0)).sum())


def test_the_switch_loss_balances():
    violations = {}
    for coefficient in (0.0, 1.0):
        router = build("switch", bias=True, spread=1.0, coefficient=coefficient)
        router.bias.data[:2] = 2.0
        optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
        for seed in range(60):
            router(hidden_states(200, seed=seed))
            optimizer.zero_grad()
            monge.aux_loss(router).backward()
            optimizer.step()
        violations[coefficient] = router.eval()(hidden_states(1000)).max_violation
    assert violations[1.0] < 0.5 < violations[0.0]


def test_losses_of_masked_and_balanced_batches():
    probs = torch.full((8, 4), 0.25)
    assert load_balance_loss(probs, torch.full((4,), 0.25)).item() == pytest.approx(1.0)
    assert load_balance_loss(probs, probs[0], mask=torch.zeros(8, dtype=torch.bool)).item() == 0
    logits = torch.randn(8, 4)
    mask = torch.tensor([True] * 5 + [False] * 3)
    torch.testing.assert_close(z_loss(logits, mask=mask), z_loss(logits[:5]))
    torch.testing.assert_close(z_loss(logits), logits.exp().sum(1).log().square().mean())
    assert squared_cv(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert squared_cv(torch.zeros(3)).item() == 0
    assert sequence_balance_loss(probs[:0], torch.zeros(0, 2, dtype=torch.long), 4).item() == 0


@pytest.mark.parametrize("case", ["topk", "prices", "ssr", "expert_choice"])
def test_z_loss_is_an_option_of_any_router(case):
    router = build(case, z_loss=0.5)
    routing = router(hidden_states(20))
    torch.testing.assert_close(routing.aux_loss, 0.5 * z_loss(routing.logits))
    assert router.eval()(hidden_states(20)).aux_loss is None


def test_noisy_topk_is_the_formula():
    router = build("noisy_topk", coefficient=1.0)
    router.noise_weight.data.normal_()
    hidden = hidden_states(40)
    torch.manual_seed(4)
    routing = router(hidden)
    torch.manual_seed(4)
    scale = F.softplus(hidden @ router.noise_weight.T)
    noisy = routing.logits + torch.randn(40, 6) * scale
    values, indices = noisy.topk(2, dim=1)
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, values.softmax(1))
    gates = torch.zeros(40, 6).scatter(1, indices, values.softmax(1))
    stays = torch.empty(40, 6)
    for t in range(40):
        for e in range(6):
            others = torch.cat([noisy[t, :e], noisy[t, e + 1 :]])
            to_beat = others.topk(2).values[-1]  # k-th largest excluding e, eq. 9 of the paper
            stays[t, e] = torch.special.ndtr((routing.logits[t, e] - to_beat) / scale[t, e])
    torch.testing.assert_close(routing.aux_loss, squared_cv(gates.sum(0)) + squared_cv(stays.sum(0)))
    routing.aux_loss.backward()
    assert router.noise_weight.grad.norm() > 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_base_is_the_optimal_assignment_with_sigmoid_gates(top_k):
    router = build("base", top_k=top_k)
    routing = router(hidden_states(30))
    assert routing.loads.tolist() == [5 * top_k] * 6
    direct = monge.ot.assign(routing.logits.detach(), top_k)
    chosen = routing.logits.gather(1, routing.indices)
    assert chosen.sum().item() == pytest.approx(float(direct.objective), abs=1e-4)
    torch.testing.assert_close(routing.weights, chosen.sigmoid())
    assert torch.equal(router.eval()(hidden_states(30)).indices, routing.logits.topk(top_k, dim=1).indices)


def test_sbase_chooses_by_the_plan_and_weighs_by_softmax():
    router = build("sbase", iterations=500, tol=1e-7)
    routing = router(hidden_states(60))
    plan = monge.ot.sinkhorn(routing.logits.detach(), tol=1e-7, max_iters=500).plan
    assert torch.equal(routing.indices, plan.topk(2, dim=1).indices)
    torch.testing.assert_close(routing.weights, routing.logits.gather(1, routing.indices).softmax(1))


def test_expert_choice_takes_the_tokens_of_largest_probability():
    routing = build("expert_choice")(hidden_states(30))
    probs = routing.logits.softmax(1)
    for expert in range(6):
        taken = (routing.indices[:, expert] == expert).nonzero().flatten()
        assert set(taken.tolist()) == set(probs[:, expert].topk(10).indices.tolist())
        torch.testing.assert_close(routing.weights[taken, expert], probs[taken, expert])


@pytest.mark.parametrize(("factor", "T"), [(1.0, 7), (1.25, 48), (0.5, 10), (2.0, 12), (1.1, 30), (9.0, 5)])
def test_expert_choice_capacity(factor, T):
    capacity = min(math.ceil(round(factor * T * 2 / 6, 9)), T)
    assert build("expert_choice", capacity_factor=factor)(hidden_states(T)).loads.tolist() == [capacity] * 6
    mask = torch.cat([torch.ones(T, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)])
    masked = build("expert_choice", capacity_factor=factor)(hidden_states(T + 9), mask)
    assert masked.loads.tolist() == [capacity] * 6


def test_expert_choice_evaluates_per_token():
    router = build("expert_choice").eval()
    routing = router(hidden_states(30))
    for row, logits in zip(routing.indices, routing.logits):
        assert set(row[row >= 0].tolist()) == set(logits.topk(2).indices.tolist())


def test_hash_follows_the_ids_and_spreads_them_evenly():
    router = make_router("hash", dim=8, num_experts=6, top_k=2, seed=3)
    ids = torch.arange(30_000)
    routing = router(torch.zeros(30_000, 8), token_ids=ids)
    assert routing.max_violation < 0.05
    again = router(torch.randn(30_000, 8), token_ids=ids.reshape(100, 300).flatten())
    assert torch.equal(again.indices, routing.indices)
    assert (routing.weights == 0.5).all()
    other = make_router("hash", dim=8, num_experts=6, top_k=2, seed=4)
    assert not torch.equal(other(torch.zeros(30_000, 8), token_ids=ids).indices, routing.indices)
    assert router.table.flatten().bincount().unique().numel() == 1  # every expert equally often
    assert len(set(map(tuple, router.table.tolist()))) == 30  # all ordered pairs occur


def test_hash_of_hidden_states_is_fixed_and_local():
    router = build("hash")
    hidden = hidden_states(2000)
    routing = router(hidden)
    assert torch.equal(router.eval()(hidden).indices, routing.indices)
    assert torch.equal(router(3.0 * hidden).indices, routing.indices)  # signs do not know the length
    near = (router(hidden + 1e-4 * torch.randn_like(hidden)).indices == routing.indices).float().mean()
    assert near > 0.95
    assert routing.max_violation < 0.5
    assert not router.weight.requires_grad


def test_the_hash_scrambles_close_codes():
    codes = mixed(torch.arange(1 << 16)) % 4096
    assert codes.min() >= 0
    assert codes.bincount(minlength=4096).max() < 45  # 16 on average
