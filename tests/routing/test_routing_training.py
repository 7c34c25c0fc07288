"""One training step whatever happens around it: recomputation, micro-batches, a forgotten `monge.step`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from routing_cases import CASES, D, Layer, build, gradients, hidden_states
from torch import nn
from torch.utils.checkpoint import checkpoint

import monge
from monge.routing.ssr import SSR
from monge.routing.stepped import SteppedRouter

every = pytest.mark.parametrize("case", CASES)
STEPPED = [case for case in CASES if build(case).needs_step]
COLLECTING = [case for case in STEPPED if case != "ssr_rare"]  # p = 0: no transport step, nothing to collect


def two_layers(case: str, **options) -> nn.Module:
    return nn.Sequential(*(Layer(build(case, layer=layer, **options)) for layer in range(2)))


def run(model: nn.Module, hidden: torch.Tensor, use_reentrant: bool | None) -> None:
    """A training step's forward and backward, each layer checkpointed or (None) not."""
    torch.manual_seed(0)
    x = hidden.clone().requires_grad_()
    for layer in model:
        x = layer(x) if use_reentrant is None else checkpoint(layer, x, use_reentrant=use_reentrant)
    loss = x.square().mean()
    if use_reentrant is not True:
        loss = loss + monge.aux_loss(model)
    loss.backward()


def check_recomputation(model: nn.Module, use_reentrant: bool) -> None:
    """Gradients, statistics and the step that follows are those of a run without checkpointing."""
    plain = copy.deepcopy(model)
    if use_reentrant:
        for router in (*monge.routing.stepping.routers_of(model), *monge.routing.stepping.routers_of(plain)):
            router.coefficient = router.z_loss = 0.0  # such losses get no gradient there, see below
    for seed in range(3):  # several, so that a random branch takes both values
        hidden = hidden_states(4, 8, seed=seed)
        for m, mode in ((model, use_reentrant), (plain, None)):
            m.zero_grad()
            run(m, hidden, mode)
        expected = gradients(plain)
        assert gradients(model).keys() == expected.keys()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")
        for a, b in zip(model, plain, strict=True):
            if isinstance(a.router, SteppedRouter):
                assert torch.equal(a.router.collected, b.router.collected)
        monge.step(model)
        monge.step(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))


@every
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_and_decides_once(case, use_reentrant):
    check_recomputation(two_layers(case), use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_ssr_takes_the_same_branch_on_recomputation(use_reentrant):
    model = two_layers("ssr_carry", p=0.5, seed=2)
    check_recomputation(model, use_reentrant)
    assert 0 < model[0].router.ot_steps + model[1].router.ot_steps < 6


class DecidedAnew(SSR):
    """The mistake the contract forbids: the branch is drawn in forward."""

    def choose(self, logits_TE, batch):
        self.transport = not self.transport
        return super().choose(logits_TE, batch)


class CountedTwice(SteppedRouter):
    """Another: the accumulator is written without asking whether a backward pass runs."""

    def choose(self, logits_TE, batch):
        self.collected.add_(1.0)
        indices = logits_TE.topk(self.top_k).indices
        return monge.routing.router.Choice(indices, logits_TE.softmax(1).gather(1, indices))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mistake", [lambda: DecidedAnew(D, 6, 2, p=0.5), lambda: CountedTwice(D, 6, 2)])
def test_the_check_of_recomputation_sees_mistakes(mistake, use_reentrant):
    with pytest.raises((AssertionError, torch.utils.checkpoint.CheckpointError)):
        check_recomputation(nn.Sequential(Layer(mistake())), use_reentrant)


@pytest.mark.parametrize("case", COLLECTING)
def test_micro_batches_count_by_their_tokens(case):
    """The state after a step follows from the token-weighted mean of what each micro-batch says."""
    router = build(case)
    sizes, said = (8, 40, 0, 16), []
    for size in sizes:
        alone = copy.deepcopy(router)
        alone(hidden_states(size, seed=size))
        said.append(alone.collected)
    for size in sizes:
        router(hidden_states(size, seed=size))
    assert router.collected[-1] == 64
    if case != "ssr_noise":
        torch.testing.assert_close(router.collected, sum(said))
    mean = router.collected[:-1] / 64
    expected = copy.deepcopy(router)
    expected.update(mean, torch.tensor(True))
    monge.step(router)
    for name, value in router.state_dict().items():
        if name != "steps":
            torch.testing.assert_close(value, expected.state_dict()[name])
    assert router.collected.abs().sum() == 0


@pytest.mark.parametrize("case", STEPPED)
def test_training_without_step_warns_once(case):
    model = Layer(build(case))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(step: bool) -> None:
        for _ in range(2):  # gradient accumulation
            model(hidden_states(16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            monge.step(model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(step=True)
        model.eval()(hidden_states(16))
        model.train()
        train(step=False)
    with pytest.warns(RuntimeWarning, match=r"monge.step\(model\) after every optimizer.step"):
        train(step=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(step=False)


def test_routers_without_state_need_no_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in set(CASES) - set(STEPPED):
            model = Layer(build(case))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for _ in range(3):
                model(hidden_states(16)).square().mean().backward()
                optimizer.step()


def test_aux_loss_sums_the_layers_and_has_a_gradient():
    model = nn.Sequential(Layer(build("switch", z_loss=0.1)), Layer(build("topk")), Layer(build("switch")))
    model(hidden_states(16))
    parts = [layer.router.last_aux_loss for layer in model]
    assert parts[1] is None
    total = monge.aux_loss(model)
    assert total.item() == pytest.approx(parts[0].item() + parts[2].item())
    total.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in (model[0], model[2]))
    model.eval()(hidden_states(16))
    assert monge.aux_loss(model).item() == 0


def test_aux_loss_under_reentrant_checkpointing_warns_that_it_teaches_nothing():
    model = Layer(build("switch"))
    checkpoint(model, hidden_states(16).requires_grad_(), use_reentrant=True)
    with pytest.warns(RuntimeWarning, match="use_reentrant=False"):
        monge.aux_loss(model)


@pytest.mark.parametrize(
    "call", [monge.step, monge.aux_loss, lambda m: monge.routing.training_routes(m).__enter__()]
)
def test_a_model_without_routers_is_an_error(call):
    with pytest.raises(ValueError, match=r"Linear has no router of monge.*monge\.MoE"):
        call(nn.Linear(2, 2))
