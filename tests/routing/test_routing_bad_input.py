"""Bad input: every message names what was given and what to do."""

from __future__ import annotations

import inspect

import pytest
import torch
from routing_cases import CASES, D, E, K, build, hidden_states

import monge
from monge.routing import ROUTERS, make_router, router_options, use_group


def test_an_unknown_router_lists_all():
    with pytest.raises(ValueError, match="there is no router 'sinkhorn'; the routers are") as error:
        make_router("sinkhorn", dim=8, num_experts=4, top_k=2)
    assert all(name in str(error.value) for name in ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_an_unknown_option_lists_the_valid_ones(name):
    with pytest.raises(
        ValueError, match=f"router {name!r} has no option 'epsilom'; its options are"
    ) as error:
        make_router(name, dim=8, num_experts=4, top_k=2, epsilom=1.0)
    for option in router_options(name):
        assert option in str(error.value)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_listed_option_is_accepted(name):
    for option in router_options(name):
        for cls in ROUTERS[name].__mro__:
            parameter = inspect.signature(cls.__init__).parameters.get(option)
            if parameter is not None:
                break
        make_router(name, dim=8, num_experts=4, top_k=2, **{option: parameter.default})


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"top_k": 5}, r"top_k=5 experts per token need at least as many experts, got num_experts=4"),
        ({"top_k": 0}, "top_k must be finite and at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be finite and at least 1, got 0"),
        ({"dim": -8}, "dim must be finite and at least 1, got -8"),
    ],
)
def test_sizes(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_router(name, **({"dim": 8, "num_experts": 4, "top_k": 2} | sizes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_that_are_not_finite(case, value, mode):
    router = build(case, layer=17).train(mode == "train")
    hidden = hidden_states(2, 6)
    hidden[1, 3] = value
    with pytest.raises(
        ValueError, match=r"router of layer 17: 6 of 72 logits are NaN or infinite, the first in token 9"
    ):
        router(hidden)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3] = False
    router(hidden, mask)  # the remedy of the message


@pytest.mark.parametrize(
    ("hidden", "more", "error", "message"),
    [
        (torch.zeros(4, 9), {}, ValueError, r"hidden must be \(..., dim=8\), got shape \(4, 9\)"),
        (
            torch.zeros(4, 8, dtype=torch.int64),
            {},
            TypeError,
            "hidden must be floating point, got torch.int64",
        ),
        (torch.zeros(2, 3, 8), {"mask": torch.ones(2, 2)}, ValueError, r"mask must be \(2, 3\) or \(6,\)"),
        (torch.zeros(2, 3, 8), {"mask": torch.ones(2, 3)}, TypeError, "mask must be bool or integer"),
        (torch.zeros(4, 8), {"token_ids": torch.zeros(5).long()}, ValueError, r"token_ids must be \(4,\)"),
        (torch.zeros(4, 8), {"token_ids": torch.zeros(4)}, TypeError, "token_ids must be bool or integer"),
    ],
)
def test_inputs(hidden, more, error, message):
    with pytest.raises(error, match=message):
        build("hash")(hidden, **more)


def test_an_integer_mask_of_a_tokenizer_is_accepted():
    router = build("prices")
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    routing = router(hidden_states(2, 3), mask)
    assert routing.mask.tolist() == [True, True, True, True, False, False]


def test_a_negative_coefficient():
    with pytest.raises(ValueError, match="z_loss must be finite and not negative, got -1"):
        make_router("topk", dim=8, num_experts=4, top_k=2, z_loss=-1)


def test_a_half_precision_overflow_is_reported_not_routed():
    layer = monge.routing.make_router("prices", dim=8, num_experts=4, top_k=2)
    hidden = (torch.full((3, 8), 60000.0).half() * 2).requires_grad_()
    with pytest.raises(ValueError, match="use bfloat16 in place of float16"):
        layer(hidden)


def test_a_group_needs_routers_that_can_share():
    class Group:
        """Stands for a process group; nothing is sent."""

    router = make_router("ssr", dim=D, num_experts=E, top_k=K, backward="unrolled")
    with pytest.raises(ValueError, match="backward='implicit'"):
        use_group(router, Group())
    assert router.ranks.is_local
    use_group(router, None)
    with pytest.raises(ValueError, match="no router"):
        use_group(torch.nn.Linear(2, 2), None)
