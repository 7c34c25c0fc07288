"""A model trained with Monge is reloaded where monge cannot be imported, and with Monge."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from elsewhere import WITHOUT_MONGE
from hf_models import FAMILIES, SIGMOID, tiny, tokens, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import monge
from monge.hf.router import adapters
from monge.hf.saving import STATE
from monge.routing import ROUTERS

EXACT = ("topk", "switch", "noisy_topk", "sbase", "ssr", "maxscore")  # plain top-k at inference
IN_BIAS = ("lossfree", "quantile", "prices")  # where the architecture has one
FAST = ("ssr", "maxscore", "prices")

ELSEWHERE = (
    WITHOUT_MONGE
    + """
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()
root = Path(sys.argv[1])
ids = load_file(root / "inputs.safetensors")["ids"]
results = {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        results[folder.name] = model.eval()(ids).logits
save_file(results, root / "outputs.safetensors")
"""
)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    "names", [FAST, pytest.param([n for n in ROUTERS if n not in FAST], marks=pytest.mark.slow)]
)
def test_every_family_with_every_router_in_a_process_without_monge(names, tmp_path):
    """Stock inference is what `stock_inference` says; and what this router does, wherever it is promised."""
    ids = tokens(batch=4, length=24)
    save_file({"ids": ids}, tmp_path / "inputs.safetensors")
    ours, predicted = {}, {}
    for family in FAMILIES:
        for name in names:
            model = monge.hf.use_router(tiny(family), name)
            train(model)
            ours[family, name] = logits(model, ids)
            with monge.hf.stock_inference(model):
                predicted[family, name] = logits(model, ids)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model.save_pretrained(tmp_path / f"{family}-{name}")
            exact = name in EXACT or (family in SIGMOID and name in (*IN_BIAS, "sigmoid"))
            assert [w for w in told if "stock transformers" in str(w.message)] == [] or not exact
            assert exact or told
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "outputs.safetensors")
    for (family, name), mine in ours.items():
        stock = theirs[f"{family}-{name}"]
        assert torch.allclose(stock, predicted[family, name], atol=1e-5), (family, name)
        exact = name in EXACT or (family in SIGMOID and name in (*IN_BIAS, "sigmoid"))
        if exact:
            assert torch.allclose(stock, mine, atol=1e-4), (family, name)
        elif name != "expert_choice":  # without renormalisation its gates are the architecture's
            assert not torch.allclose(stock, mine, atol=1e-4), (family, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["prices", "ssr", "noisy_topk"])
def test_monge_restores_everything(family, name, tmp_path):
    from transformers import AutoModelForCausalLM

    options = {"carry": True, "p": 0.5} if name == "ssr" else {}
    model = monge.hf.use_router(tiny(family), name, seed=4, **options)
    train(model)
    ids = tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    loaded = monge.hf.load_state(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)
    again = monge.hf.use_router(AutoModelForCausalLM.from_pretrained(tmp_path), name, seed=4, **options)
    fresh = monge.hf.use_router(
        AutoModelForCausalLM.from_pretrained(tmp_path), name, resume=False, seed=4, **options
    )
    for other in (loaded, again):
        assert torch.equal(logits(other, ids), logits(model, ids))
        for gate, theirs in zip(adapters(model), adapters(other)):
            assert {k: v.tolist() for k, v in gate.router.state_dict().items()} == {
                k: v.tolist() for k, v in theirs.router.state_dict().items()
            }
            assert theirs.router.seed == 4
            if name == "ssr":
                assert theirs.router.transport == gate.router.transport
    if name != "noisy_topk":
        assert int(next(adapters(fresh)).router.steps) == 0
    with safe_open(tmp_path / STATE, "pt") as file:
        assert file.metadata()["router"] == name
        assert all(key.startswith("layers.") for key in file.keys())  # noqa: SIM118


def test_measured_loss_of_stock_inference():
    """Against losses computed here, and zero where nothing is lost."""
    model = monge.hf.use_router(tiny("Mixtral"), "prices")
    for gate in adapters(model):
        gate.router.prices.copy_(torch.tensor([3.0, 0, 0, 0]))
    batches = [tokens(seed=seed) for seed in range(3)]
    found = monge.hf.compare_with_stock(model.train(), batches)
    assert model.training
    model.eval()
    ids = torch.cat(batches)
    loss = torch.nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    monge.hf.restore_router(model)
    stock = torch.nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.loss == pytest.approx(float(loss), abs=1e-5)
    assert found.loss_stock == pytest.approx(float(stock), abs=1e-5)
    assert found.routes_changed > 0.1
    assert found.kl > 0
    exact = monge.hf.compare_with_stock(monge.hf.use_router(model, "maxscore"), batches)
    assert (exact.routes_changed, round(exact.loss - exact.loss_stock, 5)) == (0, 0)
    with pytest.raises(ValueError, match="batches is empty"):
        monge.hf.compare_with_stock(model, [])
    with pytest.raises(ValueError, match="does not route by monge"):
        monge.hf.compare_with_stock(tiny("Mixtral"), batches)


def test_a_state_that_does_not_fit_or_is_damaged(tmp_path):
    model = monge.hf.use_router(tiny("Mixtral"), "prices")
    path = monge.hf.save_state(model, tmp_path / "new")
    assert sorted(p.name for p in path.parent.iterdir()) == [STATE]
    with pytest.raises(ValueError, match="does not fit MixtralForCausalLM"):
        monge.hf.load_state(tiny("Mixtral", num_local_experts=8), path.parent)
    with pytest.raises(ValueError, match="cannot be read"):
        monge.hf.load_state(model, tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        monge.hf.load_state(model, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no state of format"):
        monge.hf.load_state(model, path)
    with pytest.raises(ValueError, match="does not route by monge"):
        monge.hf.save_state(tiny("Mixtral"), tmp_path)


def test_peft_wraps_it(tmp_path):
    import peft

    model = monge.hf.use_router(tiny("Mixtral"), "prices")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    frozen = model.model.layers[0].mlp.gate.weight.clone()
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    with monge.watch(wrapped) as w:
        train(wrapped)
    assert w.metrics()["total"]["tokens"] == 90
    assert torch.equal(model.model.layers[0].mlp.gate.weight, frozen)
    prices = next(adapters(model)).router.prices
    assert prices.any()
    wrapped.save_pretrained(tmp_path)
    monge.hf.save_state(wrapped, tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny("Mixtral"), tmp_path)
    monge.hf.load_state(reloaded, tmp_path)
    ids = tokens()
    assert torch.allclose(logits(reloaded.eval(), ids), logits(wrapped.eval(), ids), atol=1e-6)
    trained = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(monge.hf.use_router(tiny("Mixtral"), "prices"), trained)
    before = next(adapters(tuned)).weight.clone()
    train(tuned)
    moved = [gate for gate in adapters(tuned) if gate.router.prices.any()]
    assert len(moved) == 2  # the trained copies
    assert not torch.equal(moved[0].weight, before)
    assert torch.equal(next(adapters(tuned)).weight, before)
    monge.hf.save_state(tuned, tmp_path / "tuned")


def test_a_damaged_state_beside_the_checkpoint_changes_nothing(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny("Mixtral").save_pretrained(tmp_path)
    (tmp_path / STATE).write_bytes(b"no state")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = type(model.model.layers[0].mlp.gate)
    with pytest.raises(ValueError, match="cannot be read"):
        monge.hf.use_router(model, "prices")
    assert type(model.model.layers[0].mlp.gate) is before
    assert (
        next(adapters(monge.hf.use_router(model, "prices", resume=False))) is model.model.layers[0].mlp.gate
    )
