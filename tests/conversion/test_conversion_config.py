"""What the settings say of an FFN, and how the shares of the model and of layers are told in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monge import MoE
from monge.conversion import ConvertConfig, convert, load
from monge.conversion.types import ExpertShape


@pytest.mark.parametrize(
    ("fields", "neurons", "shape"),
    [
        ({}, 1536, ExpertShape(1536, 32, 16, 8)),
        ({"expert_size": 128}, 1536, ExpertShape(1536, 12, 6, 3)),
        ({"expert_size": 100, "ffn_active": 0.25, "shared": 0.0}, 1536, ExpertShape(1536, 15, 4, 0)),
        ({"expert_size": 5000, "ffn_active": 1.0}, 1536, ExpertShape(1536, 1, 1, 0)),
        ({"experts": 7, "ffn_active": 0.01}, 50, ExpertShape(50, 7, 1, 0)),
    ],
)
def test_an_ffn_is_divided_by_number_or_size_of_experts(fields, neurons, shape):
    assert ConvertConfig(**fields).shape_for(neurons) == shape


def test_budgets_hold_for_the_converted_layers_in_their_order():
    config = ConvertConfig(experts=8, budgets=(0.25, 0.5, 1.0), layers=(5, 1, 3), shared=0.0)
    assert [config.shape_for(48, layer).active for layer in (1, 3, 5)] == [2, 4, 8]
    assert ConvertConfig(experts=8, budgets=(0.25, 0.5)).shape_for(48, 1).active == 4
    with pytest.raises(ValueError, match="budgets has 3 shares for 2 converted layers"):
        replace(config, layers=(1, 3)).layers_of(6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budgets": (0.5, 0.0)}, "budgets must be shares"),
        ({"model_active": 1.5}, "model_active must be a share"),
        ({"model_active": 0.5, "budgets": (0.5,)}, "both say how much"),
        ({"expert_size": -1}, "expert_size must be a number of neurons"),
    ],
)
def test_shares_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        ConvertConfig(**fields)


@pytest.fixture
def config(tiny_text):
    return ConvertConfig(
        experts=24, shared=0.25, text=(tiny_text(),), tokens=1024, length=32, eval_tokens=256, threads=1
    )


def test_a_share_of_all_parameters_is_met(tiny_model, tiny_tokenizer, config):
    model = tiny_model("llama")
    result = convert(model, replace(config, model_active=0.9), tokenizer=tiny_tokenizer)
    routers = sum(m.router.weight.numel() for m in result.model.modules() if isinstance(m, MoE))
    active = (result.summary["params_active"] - routers) / sum(p.numel() for p in model.parameters())
    group = 3 * 2 * model.config.hidden_size / sum(p.numel() for p in model.parameters())
    assert active == pytest.approx(0.9, abs=3 * group)  # to a group of neurons in each of three layers
    assert result.config.model_active == 0.9
    with pytest.raises(ValueError, match=r"model_active=0\.2 cannot be reached: \d+% of the parameters lie"):
        convert(model, replace(config, model_active=0.2), tokenizer=tiny_tokenizer)


def test_layers_with_budgets_of_their_own_become_a_monge_checkpoint(tiny_folder, config, tmp_path):
    config = replace(config, experts=6, budgets=(0.17, 0.5, 1.0))
    result = convert(tiny_folder("llama"), config, out=tmp_path / "out")
    assert [layer.mlp.top_k for layer in result.model.model.layers] == [1, 2, 4]
    loaded = load(result.path)
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"no place for .*layer"):
        convert(tiny_folder("llama"), replace(config, to="granitemoeshared"), out=tmp_path / "other")


@pytest.mark.parametrize("method", ["static", "gradient"])
def test_methods_that_divide_all_layers_alike_say_so(tiny_folder, config, method):
    with pytest.raises(ValueError, match=f"'{method}' divides all layers alike: leave budgets out"):
        convert(tiny_folder("llama"), replace(config, method=method, budgets=(0.5, 0.5, 1.0)))
