"""How routers are spelled: what the options become, and what is refused before anything is trained."""

from __future__ import annotations

import pytest

from monge.lab.models import build_model, moe_layers
from monge.lab.presets import PAPERS, PRESETS
from monge.lab.routers import parse_router


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("topk", "topk", {}),
        ("ssr:p=.05,carry=True", "ssr", {"p": 0.05, "carry": True}),
        ("ssr: p = 1 , carry = false", "ssr", {"p": 1, "carry": False}),
        ("topk:renormalise=None", "topk", {"renormalise": None}),
        (
            "maxscore:gates=soft_topk,temperature=1e-2",
            "maxscore",
            {"gates": "soft_topk", "temperature": 0.01},
        ),
    ],
)
def test_a_spelling_is_a_name_and_typed_options(text, name, options):
    spec = parse_router(text)
    assert (spec.name, spec.options, spec.text) == (name, options, text)
    assert all(type(spec.options[key]) is type(value) for key, value in options.items())


@pytest.mark.parametrize(
    "text", ["ssr:", "ssr:p", "ssr:p=", "ssr:=1", "ssr:p=1,", "ssr:p=1,p=2", "ssr:p 1", "dense:p=1"]
)
def test_a_misspelling_is_named(text, make_config):
    with pytest.raises(ValueError, match="routers: "):
        make_config(routers=(text,))


@pytest.mark.parametrize(
    "routers", [("ssr:p=0.5", "ssr:p=.5"), ("ssr:p=1,carry=True", "ssr:carry=true,p=1"), ("topk", "topk")]
)
def test_the_same_router_twice_is_refused(routers, make_config):
    with pytest.raises(ValueError, match="routers names one twice"):
        make_config(routers=routers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ssr:q=1", r"'ssr' has no option 'q'; its options are p, epsilon, .*capacity_factor of the layer"),
        ("ssr:seed=1", "no option 'seed'"),
        ("ssr:p=2", r"'ssr:p=2' cannot be made: p must be a probability, got 2"),
        ("ssr:p=often", "'ssr:p=often' cannot be made"),
        ("maxscore:gates=soft", "'maxscore:gates=soft' cannot be made"),
        ("topk:capacity_factor=-1", "'topk:capacity_factor=-1' cannot be made"),
    ],
)
def test_what_a_router_cannot_be_is_said_before_training(text, said, make_config):
    with pytest.raises(ValueError, match=said):
        build_model(text, make_config(), 0)


def test_options_reach_the_router_over_those_of_the_experiment(make_config):
    config = make_config(steps=100, annealing=0.3)
    routers = {
        text: next(iter(moe_layers(build_model(text, config, 0)).values())).router
        for text in ("ssr", "ssr:p=0.25", "maxscore:gates=annealed", "maxscore:gates=annealed,anneal_steps=7")
    }
    assert [router.p for router in list(routers.values())[:2]] == [0.5, 0.25]
    assert [router.anneal_steps for router in list(routers.values())[2:]] == [30, 7]


def test_a_capacity_is_the_routers_where_it_has_one_else_the_layers(make_config):
    layers = {
        name: next(iter(moe_layers(build_model(f"{name}:capacity_factor=1.5", make_config(), 0)).values()))
        for name in ("maxscore", "switch")
    }
    assert (layers["maxscore"].capacity_factor, layers["maxscore"].router.capacity_factor) == (None, 1.5)
    assert layers["switch"].capacity_factor == 1.5


def test_every_router_of_every_preset_can_be_made(make_config):
    texts = dict.fromkeys(text for preset in PRESETS.values() for text in preset.routers)
    assert set(PAPERS) <= set(texts)
    for text in texts:
        build_model(text, make_config(router_bias=3.0), 0)
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert preset.seeds >= 3


def test_a_synthetic_bias_starts_on_a_quarter_and_is_learned(make_config):
    model = build_model("prices", make_config(experts=8, router_bias=3.0), 0)
    (layer,) = moe_layers(model).values()
    assert layer.router.bias.tolist() == [3.0] * 2 + [0.0] * 6
    assert layer.router.bias.requires_grad
    (plain,) = moe_layers(build_model("prices", make_config(), 0)).values()
    assert plain.router.bias is None
