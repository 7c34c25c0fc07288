"""A conversion on another device than the CPU: on a pretended one, and on an accelerator if there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pretended import DEVICE, pretended_device

from monge.conversion import ConvertConfig, convert
from monge.conversion.opening import open_any
from monge.workspace.records import Records

METHODS = ("ot_lloyd", "gradient", "activation_kmeans", "weight_kmeans", "cmoe", "random", "static")
CHANGES = {
    **{method: {"method": method} for method in METHODS},
    "dot": {"method": "dot", "align_steps": 3},
    "dot from ot_lloyd": {"method": "dot", "start_from": "ot_lloyd", "align_steps": 3},
    "trained router": {"router": "trained", "align_steps": 3},
    "analytic router": {"method": "cmoe", "router": "analytic"},
    "binary gates": {"gates": "binary"},
    "low rank": {"minutes": 1e-4, "trainable": "low_rank", "rank": 4},
    "fine-tuned": {"minutes": 1e-4},
}
FAST = ("ot_lloyd", "gradient", "static", "dot from ot_lloyd", "fine-tuned")


@pytest.fixture
def config(tiny_text):
    return ConvertConfig(
        experts=6, shared=0.34, text=(tiny_text(),), tokens=1024, length=32, eval_tokens=256, threads=1
    )


def logits(model, device):
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids.to(device)).logits.cpu()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, change in CHANGES.items()
    ],
)
def test_on_a_pretended_device_nothing_meets_the_cpu(tiny_folder, config, tmp_path, change):
    folder, config = tiny_folder("llama"), replace(config, **change)
    expected = convert(folder, config, out=tmp_path / "cpu")
    with pretended_device():
        result = convert(folder, replace(config, device=DEVICE.type), out=tmp_path / "device")
        assert {p.device for p in result.model.parameters()} == {DEVICE}
        again = convert(folder, replace(config, device=DEVICE.type), out=tmp_path / "device")
        found = logits(again.model, DEVICE)
    torch.testing.assert_close(found, logits(expected.model, "cpu"), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if "minutes" not in change])
def test_on_an_accelerator_the_model_is_as_good(tiny_folder, config, tmp_path, name):
    """Not the same to the bit: ties of the partition fall as products round."""
    folder, config = tiny_folder("llama"), replace(config, **CHANGES[name])
    device = torch.accelerator.current_accelerator()
    expected = convert(folder, config, out=tmp_path / "cpu")
    result = convert(folder, replace(config, device=device.type), out=tmp_path / "device")
    assert {p.device.type for p in result.model.parameters()} == {device.type}
    assert result.summary["perplexity"] == pytest.approx(expected.summary["perplexity"], rel=0.02)
    written = open_any(result.path).model
    torch.testing.assert_close(logits(written, "cpu"), logits(result.model, device), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", ["all", "low_rank"])
def test_on_an_accelerator_fine_tuning_goes_on_and_helps(tiny_folder, config, tmp_path, trainable):
    device = torch.accelerator.current_accelerator()
    config = replace(config, device=device.type, minutes=0.05, trainable=trainable, rank=4, rate=3e-3)
    result = convert(tiny_folder("llama"), config, out=tmp_path / "out")
    again = convert(tiny_folder("llama"), config, out=tmp_path / "out")
    torch.testing.assert_close(logits(again.model, device), logits(result.model, device))
    losses = [
        row["loss"] for row in Records(tmp_path / "out" / "records.jsonl").rows if row["kind"] == "train"
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_named(tiny_folder, config, tmp_path, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here .* Try device cpu"):
        convert(tiny_folder("llama"), replace(config, device=device), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_streaming_is_for_the_cpu(tiny_folder, config, tmp_path):
    with pytest.raises(ValueError, match="device 'xpu' needs the whole model in memory"):
        convert(tiny_folder("llama"), replace(config, device="xpu"), out=tmp_path / "out", stream=True)
