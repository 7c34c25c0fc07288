"""SSR: gates and gradients of the plan, the branch, carried potentials, what transport cannot repair."""

from __future__ import annotations

import pytest
import torch
from routing_cases import Layer, backward, hidden_states

import monge
from monge.routing import make_router, training_routes
from monge.routing.ssr import SSR


def ssr(spread: float = 3.0, **options) -> SSR:
    router = make_router("ssr", **{"dim": 8, "num_experts": 6, "top_k": 2, "p": 1.0} | options)
    with torch.no_grad():
        router.weight.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(7)) * spread / 8**0.5)
    return router


def plan_oracle(scores_TE: torch.Tensor, epsilon: float = 1.0, sweeps: int = 600) -> torch.Tensor:
    """Sinkhorn in float64 by alternating logsumexp, from the definition; autograd differentiates it."""
    T, E = scores_TE.shape
    log_kernel = scores_TE.double() / epsilon
    log_u, log_v = log_kernel.new_zeros(T, 1), log_kernel.new_zeros(1, E)
    for _ in range(sweeps):
        log_v = torch.tensor(T / E).double().log() - (log_kernel + log_u).logsumexp(0, keepdim=True)
        log_u = -(log_kernel + log_v).logsumexp(1, keepdim=True)
    return (log_kernel + log_u + log_v).exp()


def weight_gradient(router: SSR, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    router.zero_grad()
    routing = router(hidden)
    backward((routing.weights * target.to(routing.weights.dtype)).sum())
    return router.weight.grad if router.weight.grad is not None else torch.zeros_like(router.weight)


def check_gradient_is_that_of_the_plan(router: SSR) -> None:
    """Gates and their gradient to the weight equal those taken from the entries of the oracle's plan."""
    hidden = hidden_states(30).double()
    target = torch.randn(30, 2, generator=torch.Generator().manual_seed(3)).double()
    got = weight_gradient(router, hidden, target)
    weight = router.weight.detach().clone().requires_grad_()
    plan = plan_oracle(hidden @ weight.T)
    chosen, indices = plan.topk(2, dim=1)
    gates = chosen / chosen.sum(1, keepdim=True)
    (gates * target).sum().backward()
    routing = router(hidden)
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, gates, rtol=0, atol=1e-6)
    torch.testing.assert_close(got, weight.grad, rtol=1e-5, atol=1e-6)
    assert got.norm() > 0.1


@pytest.mark.parametrize("backward", ["implicit", "unrolled"])
def test_gates_and_gradient_are_those_of_the_plan(backward):
    router = ssr(tol=1e-12, iterations=400, backward=backward, dtype=torch.float64)
    check_gradient_is_that_of_the_plan(router)


class DetachedPlan(SSR):
    """The mistake of routing.md: the router learns nothing from a transport step."""

    def choose(self, logits_TE, batch):
        return super().choose(logits_TE.detach(), batch)


def test_the_check_of_the_gradient_sees_a_detached_plan():
    router = DetachedPlan(8, 6, 2, p=1.0, tol=1e-12, iterations=400, dtype=torch.float64)
    router.load_state_dict(ssr(dtype=torch.float64).state_dict())
    with pytest.raises(AssertionError):
        check_gradient_is_that_of_the_plan(router)


def test_the_gradient_to_a_per_expert_bias_is_zero():
    """Pi(S + 1 c^T) = Pi(S): whatever the loss, transport steps cannot correct a bias; softmax gates can."""
    hidden = hidden_states(256)
    target = torch.randn(256, 2, generator=torch.Generator().manual_seed(3))

    def bias_gradient(**options) -> float:
        router = ssr(bias=True, tol=1e-8, iterations=2000, **options)
        router.bias.data[:2] = 3.0
        routing = router(hidden)
        (routing.weights * target).sum().backward()
        return float(router.bias.grad.norm())

    through_plan, through_softmax = bias_gradient(), bias_gradient(gates="softmax")
    assert through_softmax > 0.1
    assert through_plan <= 1e-6 * through_softmax


def test_transport_hides_a_bias_which_inference_shows_and_carry_repairs():
    hidden = hidden_states(600)
    for carry in (False, True):
        router = ssr(bias=True, carry=carry, spread=1.0)
        router.bias.data[:2] = 3.0
        assert router(hidden).max_violation < 0.4
        monge.step(router)
        violation = router.eval()(hidden).max_violation
        assert violation < 0.4 if carry else violation > 1.5


def test_carried_routing_is_the_routing_of_the_step_that_left_it():
    """With the potentials of a batch, top-k and gates of S - b are those of the plan of the same batch."""
    router = ssr(carry=True, epsilon=0.7, iterations=500, tol=1e-9)
    hidden = hidden_states(80)
    plan = router(hidden)
    monge.step(router)
    carried = router.eval()(hidden)
    assert torch.equal(plan.indices, carried.indices)
    torch.testing.assert_close(plan.weights, carried.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(carried.prices, router.prices)
    with torch.no_grad():
        router.prices.zero_()  # "prices zeroed at evaluation"
    assert not torch.equal(router(hidden).indices, plan.indices)


def test_other_steps_and_inference_are_plain_softmax_top_k():
    plain = make_router("topk", dim=8, num_experts=6, top_k=2)
    for router in (ssr(p=0.0), ssr().eval()):
        plain.weight.data.copy_(router.weight.data)
        hidden = hidden_states(50)
        assert torch.equal(router(hidden).indices, plain(hidden).indices)
        assert torch.equal(router(hidden).weights, plain(hidden).weights)


def branches(router: SSR, steps: int) -> list[bool]:
    taken = []
    for _ in range(steps):
        taken.append(router.transport)
        router(hidden_states(12))
        monge.step(router)
    return taken


def test_branches_follow_from_seed_step_and_layer():
    first = branches(ssr(p=0.3, seed=5, layer=2), 40)
    torch.manual_seed(99)  # no generator has a say
    assert branches(ssr(p=0.3, seed=5, layer=2), 40) == first
    assert branches(ssr(p=0.3, seed=5, layer=3), 40) != first
    assert branches(ssr(p=0.3, seed=6, layer=2), 40) != first


def test_transport_steps_come_with_probability_p_and_are_counted():
    router = ssr(p=0.2)
    expected = sum(router._branch(step) for step in range(5000)) / 5000
    assert expected == pytest.approx(0.2, abs=0.02)
    taken = branches(router, 60)
    assert 0 < sum(taken) < 60
    assert router.ot_steps == sum(taken)
    assert router.steps == 60


def test_the_first_step_with_carry_transports():
    assert all(ssr(p=1e-6, carry=True, seed=seed).transport for seed in range(5))
    assert not ssr(p=0.0, carry=True).transport


def test_a_loaded_state_goes_on_with_its_own_branches():
    router = ssr(p=0.5, seed=1)
    all_branches = branches(router, 20)
    half = ssr(p=0.5, seed=1)
    branches(half, 9)
    resumed = ssr(p=0.5, seed=1)
    resumed.load_state_dict(half.state_dict())
    assert branches(resumed, 11) == all_branches[9:]


def test_micro_batches_of_a_step_take_one_branch():
    model = Layer(ssr(p=0.5, seed=1))
    for _ in range(6):
        transport = model.router.transport
        before = int(model.router.ot_steps)
        for seed in range(3):
            model(hidden_states(10, seed=seed))
            assert model.router.transport == transport
        monge.step(model)
        assert int(model.router.ot_steps) - before == transport


def test_scores_of_the_softmax_at_small_epsilon():
    router = ssr(scores="softmax", epsilon=0.05, iterations=2000, tol=1e-8)
    routing = router(hidden_states(60))
    plan = plan_oracle(routing.logits.detach().softmax(1), epsilon=0.05)
    chosen, indices = plan.topk(2, dim=1)
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(
        routing.weights.double(), chosen / chosen.sum(1, keepdim=True), rtol=0, atol=1e-5
    )


def test_noise_is_drawn_on_transport_steps_alone():
    router = ssr(sigma=1.0)
    hidden = hidden_states(60)
    noisy = [router(hidden).indices for _ in range(2)]
    assert not torch.equal(*noisy)
    router.eval()
    assert torch.equal(router(hidden).indices, router(hidden).indices)
    with training_routes(router):
        assert not torch.equal(router(hidden).indices, router(hidden).indices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p must be a probability"),
        ({"epsilon": 0.0}, "epsilon must be finite and above 0"),
        ({"iterations": 0}, "iterations must be finite and at least 1"),
        ({"sigma": -1.0}, "sigma must be finite and not negative"),
        ({"gates": "sigmoid"}, "gates must be one of 'plan', 'softmax'; got 'sigmoid'"),
        ({"backward": "none"}, "backward must be one of"),
        ({"scores": "z"}, "scores must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ssr(**options)
