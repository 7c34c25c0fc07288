"""Two gloo processes that share the steps of joint training: the result of one process, written once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from alignment_cases import tiny_llama, token_chunks
from ranks import on_ranks

from monge.conversion import ConvertConfig, convert
from monge.conversion.alignment import AlignmentConfig, align
from monge.conversion.ffn import find_ffns
from monge.conversion.types import ExpertShape
from monge.workspace.ranks import ALONE, Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
STEPS = 8
SHAPE = ExpertShape(neurons=24, groups=6, active=3, shared=1)
EXCHANGES = {"gradients": "average_gradients", "start": "start_alike"}


def _align(config, folder, steps=STEPS, without="", seeds=(0, 0)):
    """On every rank; the model in float64, so that what is left of a difference is the masks' rounding."""
    ranks = Ranks.here()
    if without:
        setattr(Ranks, EXCHANGES[without], lambda self, tensors: None)
    model = tiny_llama()
    ffns = find_ffns(model)  # in the precision that models are read in
    aligned = align(
        model.double(),
        ffns,
        token_chunks(batch=4),
        [SHAPE] * 2,
        config=config,
        steps=steps,
        seed=seeds[ranks.rank],
        checkpoint=folder and folder / f"alignment-{ranks.rank}.safetensors",
        ranks=ranks,
    )
    return aligned, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "config", [AlignmentConfig(), AlignmentConfig(weight_rate=1e-3)], ids=["masks", "all"]
)
def test_two_processes_train_as_one_does(config, tmp_path):
    one, weights = _align(config, None)
    results = on_ranks(2, _align, config, tmp_path, STEPS, "", (0, 1))  # the first one's masks hold
    for aligned, theirs in results:
        for name, trace in one.history.items():
            assert aligned.history[name] == pytest.approx(trace, rel=1e-7, abs=1e-9), name
        for mine, own in zip(aligned.partitions, one.partitions):
            assert torch.equal(mine.labels_F, own.labels_F)
            torch.testing.assert_close(mine.router_NH, own.router_NH, rtol=1e-5, atol=1e-7)
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-8)
    assert [path.name for path in tmp_path.iterdir()] == ["alignment-0.safetensors"]


@pytest.mark.parametrize("without", EXCHANGES)
def test_without_the_exchange_they_part(without):
    results = on_ranks(2, _align, AlignmentConfig(), None, STEPS, without, (0, 1))
    routers = [aligned.partitions[0].router_NH for aligned, _ in results]
    assert (routers[0] - routers[1]).abs().max() > 1e-5


def test_an_interrupted_run_goes_on_in_all_processes(tmp_path):
    config = AlignmentConfig(checkpoint_every=1, freeze_at=1.0)
    whole, _ = on_ranks(2, _align, config, None)[0]
    on_ranks(2, _interrupted, config, tmp_path)
    (tmp_path / "alignment-1.safetensors").symlink_to(tmp_path / "alignment-0.safetensors")
    for aligned, _ in on_ranks(2, _align, config, tmp_path):
        assert aligned.history == whole.history
        for mine, own in zip(aligned.partitions, whole.partitions):
            assert torch.equal(mine.router_NH, own.router_NH)


def _interrupted(config, folder):
    """Stops in the middle of step 4, as an error would."""
    mean, calls = Ranks.mean, []

    def failing(self, values):
        calls.append(values)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mean(self, values)

    Ranks.mean = failing
    with pytest.raises(KeyboardInterrupt):
        _align(config, folder)


def test_chunks_that_do_not_divide_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"step of 3 sequences does not divide among 2 processes"):
        align(
            model, find_ffns(model), token_chunks(batch=3), [SHAPE] * 2, steps=1, ranks=Ranks(0, 2)
        )  # fmt: skip
    assert ALONE.size == 1


@pytest.mark.parametrize(
    "how", [{"method": "dot", "start_from": "ot_lloyd"}, {"method": "random", "router": "trained"}], ids=str
)
def test_convert_under_torchrun_is_that_of_one_process(how, tiny_folder, tiny_text, tmp_path):
    folder, text, out = tiny_folder("llama"), tiny_text(), tmp_path / "two"
    settings = how | {"experts": 6, "shared": 0.34, "tokens": 1024, "length": 32, "eval_tokens": 256}
    settings |= {"threads": 1, "align_steps": 6}
    spelled = [
        word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "monge", "convert"),
        *(str(folder), "--text", text, "--out", str(out), *spelled),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    one = convert(folder, ConvertConfig(text=(text,), **settings), out=tmp_path / "one")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["perplexity"] == pytest.approx(one.summary["perplexity"], rel=1e-3)
