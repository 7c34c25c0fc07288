"""Two gloo processes that share the steps of fine-tuning: the result of one process, written once."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys

import pytest
import torch
from finetune_cases import make_case, weights_of
from ranks import on_ranks

from monge.conversion import ConvertConfig, convert
from monge.conversion import finetune as training
from monge.conversion.finetune import finetune
from monge.conversion.teacher import Teacher
from monge.workspace.ranks import Ranks
from monge.workspace.records import Records

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
STEPS = 6


def _finetune(case, model, folder, *, averaged=True):
    """On every rank: the losses and the weights."""
    ranks, model = Ranks.here(), copy.deepcopy(model)  # what is handed to processes lies in shared memory
    if ranks.first:
        records = Records(folder / "records.jsonl")
    training.CHECKPOINT_SECONDS = 0.0
    if not averaged:
        Ranks.average_gradients = lambda self, parameters: None
    result = finetune(
        model,
        case.chunks_NL,
        case.teacher,
        steps=STEPS,
        config=case.config,
        checkpoint=folder / f"finetune-{ranks.rank}.safetensors",
        records=records if ranks.first else None,
        ranks=ranks,
    )
    return result.loss, weights_of(model)


def make_double(tiny_model, **settings):
    """In float64, so that what is left of a difference is not rounding."""
    case = make_case(tiny_model, batch=4, **settings)
    return case._replace(teacher=Teacher.of(case.dense.double(), case.chunks_NL))


@pytest.mark.parametrize("settings", [{}, {"trainable": "low_rank"}], ids=str)
def test_two_processes_train_as_one_does(tiny_model, tmp_path, settings):
    case = make_double(tiny_model, **settings)
    whole = case.student().double()
    one = finetune(whole, case.chunks_NL, case.teacher, steps=STEPS, config=case.config)
    results = on_ranks(2, _finetune, case._replace(student=None), case.student().double(), tmp_path)
    for loss, weights in results:
        assert loss == pytest.approx(one.loss, rel=1e-9)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetune-0.safetensors", "records.jsonl"]


def test_without_the_exchange_they_part(tiny_model, tmp_path):
    case = make_double(tiny_model)
    results = on_ranks(2, _without_exchange, case._replace(student=None), case.student().double(), tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    assert (results[0][1][name] - results[1][1][name]).abs().max() > 1e-5


def _without_exchange(case, model, folder):
    return _finetune(case, model, folder, averaged=False)


def test_a_batch_that_does_not_divide_is_refused(tiny_model):
    case = make_case(tiny_model, batch=3)
    with pytest.raises(ValueError, match=r"batch=3 does not divide among 2 processes.*multiple of 2"):
        finetune(case.student(), case.chunks_NL, case.teacher, steps=1, config=case.config, ranks=Ranks(0, 2))


def test_convert_under_torchrun_writes_once_what_one_process_would(
    tiny_folder, tiny_text, tmp_path, monkeypatch
):
    folder, text, out = tiny_folder("llama"), tiny_text(), tmp_path / "two"
    settings = shlex.split(
        "--experts 6 --shared 0.34 --tokens 1024 --length 32 --eval-tokens 256 --threads 1"
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "monge", "convert"),
        *(str(folder), "--text", text, "--out", str(out), "--minutes", "0.02", *settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nmodel    ") == 1
    steps = json.loads((out / "config.json").read_text())["finetune_steps"]
    monkeypatch.setattr("monge.conversion.training.plan_steps", lambda *args, **options: steps)
    config = ConvertConfig(
        experts=6, shared=0.34, text=(text,), tokens=1024, length=32, eval_tokens=256, threads=1, minutes=0.02
    )
    one = convert(folder, config, out=tmp_path / "one")
    files = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        for root in (out, tmp_path / "one")
    ]
    drawn = (".html", ".png", ".svg")  # by the command alone
    assert [name for name in files[0] if not name.endswith(drawn)] == files[1]
    rows = [
        [json.loads(line) for line in (root / "records.jsonl").read_text().splitlines()]
        for root in (out, tmp_path / "one")
    ]
    assert [row["kind"] for row in rows[0]] == [row["kind"] for row in rows[1]]
    for row, other in zip(*rows):
        assert row.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["perplexity"] == pytest.approx(one.summary["perplexity"], rel=1e-3)
    assert summary["perplexity_dense"] == pytest.approx(one.summary["perplexity_dense"], rel=1e-6)
