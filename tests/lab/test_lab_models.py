"""The lab's models: what the routers share is the same, and active FLOPs are equal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from monge.lab.models import build_model, moe_layers, parameter_counts
from monge.lab.optimisation import batch_of, learning_rate, make_optimizer
from monge.routing import ROUTERS


def test_shared_weights_start_the_same_whatever_the_router(make_config):
    config = make_config(layers=2)
    reference = build_model("topk", config, 3).state_dict()
    for router in ("dense", *ROUTERS):
        state = build_model(router, config, 3).state_dict()
        shared = state.keys() & reference.keys()
        assert all(torch.equal(state[name], reference[name]) for name in shared), router
        if router != "dense":
            assert reference.keys() <= state.keys()


def test_seeds_and_layers_start_apart(make_config):
    config = make_config(layers=2)
    first, second = (dict(build_model("topk", config, seed).named_parameters()) for seed in (0, 1))
    same = [name for name in first if torch.equal(first[name], second[name])]
    assert all("norm" in name for name in same)
    layers = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
    assert not torch.equal(first[layers[0]], first[layers[1]])


def test_building_a_model_leaves_the_random_state_alone(make_config):
    state = torch.get_rng_state()
    build_model("ssr", make_config(), 0)
    assert torch.equal(state, torch.get_rng_state())


def test_active_parameters_equal_the_dense_baseline_and_the_routers(make_config):
    config = make_config(layers=2)
    dense_total, dense_active = parameter_counts(build_model("dense", config, 0), config)
    total, active = parameter_counts(build_model("topk", config, 0), config)
    routers = config.layers * config.experts * config.width
    assert dense_total == dense_active == active - routers
    experts = config.layers * config.experts * 3 * config.width * config.expert_width
    assert total - active == experts * (config.experts - config.top_k) // config.experts


def test_routers_get_their_layer_and_seed(make_config):
    model = build_model("ssr", make_config(layers=2, ssr_probability=0.25), 7)
    routers = [layer.router for layer in moe_layers(model).values()]
    assert [(router.layer, router.seed, router.p) for router in routers] == [(0, 7, 0.25), (1, 7, 0.25)]


def test_every_epoch_visits_all_windows_once_in_another_order():
    windows = torch.arange(10)[:, None]
    batches = [batch_of(windows, 4, seed=0, step=step).flatten().tolist() for step in range(5)]
    visited = [window for batch in batches for window in batch]
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))
    assert visited[:10] != visited[10:]
    assert batches == [batch_of(windows, 4, seed=0, step=step).flatten().tolist() for step in range(5)]
    assert batches[0] != batch_of(windows, 4, seed=1, step=0).flatten().tolist()


def test_the_learning_rate_rises_and_falls_once(make_config):
    config = make_config(lr=1.0, warmup=10, steps=50, final_lr=0.2)
    rates = [learning_rate(step, config) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert all(b < a for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2)


def test_routers_norms_and_embeddings_do_not_decay(make_config):
    model = build_model("noisy_topk", make_config(), 0)
    decay = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(model, make_config()).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        free = any(part in name for part in ("router", "norm", "embed_tokens"))
        assert decay[id(parameter)] == (0.0 if free else 0.1), name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_k": 5}, "top_k=5 experts per token cannot be chosen from experts=4"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": -1}, "seeds must be at least 1, got -1"),
        ({"vocab": 256}, "vocab must be at least 257, got 256"),
        ({"lr": float("nan")}, "lr must lie in"),
        ({"ssr_probability": 1.5}, r"ssr_probability must lie in \[0, 1\], got 1.5"),
        ({"routers": ()}, "routers is empty"),
        ({"routers": ("topk", "topk")}, "routers names one twice"),
        ({"width": 18, "heads": 4}, r"width=18 must be a multiple of 2 \* heads = 8"),
    ],
)
def test_settings_out_of_range_are_named(make_config, fields, said):
    with pytest.raises(ValueError, match=said):
        make_config(**fields)
