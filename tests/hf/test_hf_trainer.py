"""transformers' Trainer with the callback: steps, records, auxiliary losses, checkpoints."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import tiny, tokens

import monge
from monge.hf.router import adapters
from monge.hf.saving import STATE

ROOT = Path(__file__).parents[2]


def trainer_of(model, out, *, steps=4, callback=None, **options):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "output_dir": str(out), "max_steps": steps, "per_device_train_batch_size": 2, "logging_steps": 2,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "disable_tqdm": True, **options,
    }  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=16, length=8)]
    callback = callback or monge.hf.RouterCallback()
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback]
    )


def records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_one_step_per_optimizer_step_and_records_per_layer(tmp_path):
    model = monge.hf.use_router(tiny("Mixtral"), "prices")
    trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=4)
    trainer.train()
    for gate in adapters(model):
        assert int(gate.router.steps) == 4
        assert gate.router.prices.any()
    rows = records(tmp_path)
    assert [(row["step"], row["phase"]) for row in rows if row["layer"] == "total"] == [
        (2, "train"), (4, "train"), (4, "evaluation"),
    ]  # fmt: skip
    first = next(row for row in rows if row["layer"] == "model.layers.1.mlp.gate")
    assert first["kind"] == "routing"
    assert first["tokens"] == 2 * 2 * 2 * 8  # two steps of two micro-batches of two sequences
    assert sum(first["loads"]) == 2 * first["tokens"]
    assert {"max_violation", "dead_experts", "drops"} <= set(first)
    assert set(first["drops"]) == {"1", "1.25"}
    evaluated = next(row for row in rows if row["phase"] == "evaluation")
    assert evaluated["tokens"] == 4 * 8
    assert list(tmp_path.glob("events.out.tfevents*"))
    assert not model._forward_hooks  # nothing is left behind
    assert not any(module._forward_hooks for module in model.modules() if module is not model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_auxiliary_losses_are_in_the_gradient_once(accumulation, tmp_path):
    """The oracle is a loop by hand: same data, plain gradient descent."""
    model, twin = (monge.hf.use_router(tiny("Mixtral"), "switch", coefficient=0.5) for _ in range(2))
    trainer = trainer_of(
        model, tmp_path, steps=1, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1e-2,
        max_grad_norm=0.0,
    )  # fmt: skip
    seen = []
    watched = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    trainer.train()
    watched.remove()
    assert len(seen) == accumulation
    optimizer = torch.optim.SGD(twin.parameters(), 1e-2)
    twin.train()
    for ids in seen:
        loss = twin(input_ids=ids, labels=ids).loss + monge.aux_loss(twin)
        (loss / accumulation).backward()
    optimizer.step()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(mine, theirs, atol=2e-6), name


def test_a_resumed_run_is_the_whole_run(tmp_path):
    whole = monge.hf.use_router(tiny("Qwen3Moe"), "prices")
    trainer_of(whole, tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "whole" / "checkpoint-2" / STATE).is_file()
    resumed = monge.hf.use_router(tiny("Qwen3Moe", seed=7), "prices")
    trainer = trainer_of(resumed, tmp_path / "whole", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for mine, theirs in zip(adapters(resumed), adapters(whole)):
        assert int(mine.router.steps) == 4
        assert torch.allclose(mine.router.prices, theirs.router.prices, atol=1e-6)
    for mine, theirs in zip(resumed.parameters(), whole.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)
    (tmp_path / "whole" / "checkpoint-2" / STATE).unlink()
    again = monge.hf.use_router(tiny("Qwen3Moe", seed=7), "prices")
    with pytest.warns(UserWarning, match="start from zero"):
        trainer_of(again, tmp_path / "whole").train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_a_model_without_routers_and_bad_options(tmp_path):
    with pytest.raises(ValueError, match="no router of monge"):
        trainer_of(tiny("Mixtral"), tmp_path).train()
    with pytest.raises(ValueError, match="every must be at least 1"):
        monge.hf.RouterCallback(every=0)


def test_importing_monge_does_not_import_transformers():
    code = "import sys, monge; assert 'transformers' not in sys.modules; monge.hf.RouterCallback"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    code = "import sys; sys.modules['transformers'] = None; import monge; monge.hf.RouterCallback"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'monge[hf]'" in done.stderr


def test_the_plain_log(tmp_path):
    layer = monge.MoE(8, 16, 4, 2, router="topk")
    with monge.hf.RouterLog(layer, tmp_path, tensorboard=False) as log:
        assert log.empty
        layer(torch.randn(5, 8))
        total = log.write(3)
        layer(torch.randn(7, 8))
        log.write(4)
    assert total["tokens"] == 5
    assert [(row["step"], row["tokens"]) for row in records(tmp_path) if row["layer"] == "total"] == [
        (3, 5), (4, 7),
    ]  # fmt: skip
    assert not list(tmp_path.glob("events*"))


def test_the_example_in_one_command(tmp_path):
    """New model from text files, then the saved one again with another router."""
    (tmp_path / "text").mkdir()
    for index in range(3):
        (tmp_path / "text" / f"{index}.txt").write_text(f"the {index} sun rises over the warm river " * 60)
    example = runpy.run_path(str(ROOT / "examples" / "finetune_moe.py"))
    common = {"text": (str(tmp_path / "text" / "*.txt"),), "length": 16, "batch": 4}
    first = example["Arguments"](**common, steps=8, out=tmp_path / "first", lr=1e-2)
    loss = example["main"](first)
    assert loss < 6.5  # a new model of 2,048 tokens begins at ln 2048 = 7.6
    assert records(tmp_path / "first")
    assert (tmp_path / "first" / "model" / STATE).is_file()
    second = example["Arguments"](
        **common, steps=2, out=tmp_path / "second", model=tmp_path / "first" / "model", router="ssr"
    )
    assert example["main"](second) < loss + 1
