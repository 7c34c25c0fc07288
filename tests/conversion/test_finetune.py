"""Fine-tuning of tiny models: what is trained, that it learns, and that interruptions leave no trace."""

from __future__ import annotations

import math

import pytest
import torch
from converted_models import narrow_by_hand
from finetune_cases import make_case, weights_of

from monge.conversion import finetune as training
from monge.conversion.budget import plan_steps
from monge.conversion.finetune import finetune, perplexity_of
from monge.conversion.schedule import learning_rate, sequences_of
from monge.conversion.teacher import Head, Teacher
from monge.conversion.trainable import trainable_weights
from monge.workspace.records import Records


def run(case, model, steps=12, **options):
    return finetune(model, case.chunks_NL, case.teacher, steps=steps, config=case.config, **options)


@pytest.mark.parametrize("settings", [{}, {"trainable": "low_rank"}, {"gates": "binary"}])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_falls_and_only_the_trained_weights_change(tiny_model, family, settings):
    case = make_case(tiny_model, family, rate=0.01, **settings)
    model = case.student()
    before, flags = weights_of(model), {name: p.requires_grad for name, p in model.named_parameters()}
    result = run(case, model, steps=25)
    assert sum(result.loss[-5:]) < 0.95 * sum(result.loss[:5])
    assert all(math.isclose(a, 2 * b + c, rel_tol=1e-5) for a, b, c in zip(result.loss, result.kl, result.ce))
    after = weights_of(model)
    assert after.keys() == before.keys()
    frozen = {name for name in after if torch.equal(after[name], before[name])}
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    embeddings = {name for name in matrices if "embed_tokens" in name or "lm_head" in name}
    assert frozen & matrices == embeddings
    norms = {name for name in after if "norm" in name}
    assert norms <= frozen if settings.get("trainable") == "low_rank" else not norms & frozen
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_dense_and_narrow_models_train_too(tiny_model):
    case = make_case(tiny_model)
    for model in (tiny_model("llama"), narrow_by_hand(tiny_model("llama"), 24)):
        result = run(case, model, steps=20)
        assert result.loss[-1] < 0.9 * result.loss[0]
    control = run(case, tiny_model("llama"), steps=1)
    assert control.kl[0] < 1e-5, "the dense model starts as its own teacher"


@pytest.mark.parametrize("settings", [{}, {"trainable": "low_rank"}])
@pytest.mark.parametrize("selection", [False, True])
def test_interrupted_and_resumed_is_uninterrupted(tiny_model, tmp_path, monkeypatch, settings, selection):
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    case = make_case(tiny_model, **settings)
    options = {"selection": case.chunks_NL[:3]} if selection else {}
    whole, parted = case.student(), case.student()
    expected = run(case, whole, records=Records(tmp_path / "whole.jsonl"), **options)
    path = tmp_path / "finetune.safetensors"

    class Killed(BaseException):
        pass

    def killed_at(step, written):
        def save(*arguments):
            if len(arguments[-1]["loss"]) == step and not written:
                raise Killed  # with the record of the step on disk, without its checkpoint
            save_checkpoint(*arguments)
            if len(arguments[-1]["loss"]) == step:
                raise Killed

        return save

    save_checkpoint = training.save_checkpoint
    for step, written in ((4, True), (10, False)):
        monkeypatch.setattr(training, "save_checkpoint", killed_at(step, written))
        with pytest.raises(Killed):
            run(case, parted, checkpoint=path, records=Records(tmp_path / "parted.jsonl"), **options)
        parted = case.student()  # the process is gone, the weights with it
    monkeypatch.setattr(training, "save_checkpoint", save_checkpoint)
    result = run(case, parted, checkpoint=path, records=Records(tmp_path / "parted.jsonl"), **options)
    assert (result.loss, result.selection) == (expected.loss, expected.selection)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parted.state_dict()[name]), name
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "parted.jsonl").read_bytes()
    again = case.student()
    run(case, again, checkpoint=path, **options)  # nothing left to do
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in whole.state_dict().items())


def test_records(tiny_model, tmp_path):
    case = make_case(tiny_model)
    records = Records(tmp_path / "records.jsonl")
    records.append({"kind": "layer", "layer": 0})
    result = run(case, case.student(), steps=13, records=records)
    rows = records.rows[1:]
    assert [(row["stage"], row["step"], row["steps"]) for row in rows] == [
        ("finetune", 10, 13),
        ("finetune", 13, 13),
    ]
    assert rows[0]["loss"] == pytest.approx(sum(result.loss[:10]) / 10)
    assert rows[1]["kl"] == pytest.approx(sum(result.kl[10:]) / 3)
    assert rows[1]["rate"] == pytest.approx(0.02 * case.config.rate)


def test_selection_keeps_the_best_weights(tiny_model):
    case = make_case(tiny_model, rate=0.02)
    model = case.student()
    text = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(9))  # not to be learned
    result = run(case, model, steps=8, selection=text)
    assert [step for step, _ in result.selection] == list(range(9))
    chosen, best = min(result.selection, key=lambda pair: pair[1])
    assert result.chosen == chosen < 8, "text of another kind gets worse in the end"
    assert perplexity_of(model, Head.of(model), text) == pytest.approx(best, rel=1e-5)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in text]
    assert math.exp(sum(losses) / 3) == pytest.approx(best, rel=1e-5)


def test_a_checkpoint_of_another_run_is_refused(tiny_model, tmp_path):
    case, path = make_case(tiny_model), tmp_path / "finetune.safetensors"
    run(case, case.student(), steps=2, checkpoint=path)
    with pytest.raises(ValueError, match="other text or settings"):
        run(case, case.student(), steps=3, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be used"):
        run(case, case.student(), steps=2, checkpoint=path)


def test_divergence_is_an_error_with_a_remedy(tiny_model):
    good = make_case(tiny_model, rate=0.01)
    model = tiny_model("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):  # a model with something to lose
        optimizer.zero_grad()
        model(input_ids=good.chunks_NL, labels=good.chunks_NL).loss.backward()
        optimizer.step()
    config, teacher = make_case(tiny_model, rate=0.9).config, Teacher.of(model, good.chunks_NL)
    with pytest.raises(ValueError, match=r"diverged: the loss has risen.*Lower --rate"):
        finetune(model, good.chunks_NL, teacher, steps=60, config=config)
    model = tiny_model("llama")
    model.model.norm.register_full_backward_hook(lambda module, inward, outward: (inward[0] * torch.nan,))
    with pytest.raises(ValueError, match=r"gradient of norm nan at step 1\. Lower --rate"):
        run(good, model, steps=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(good, model, steps=1)


def test_bad_input(tiny_model):
    case = make_case(tiny_model)
    with pytest.raises(ValueError, match="build the teacher on these sequences"):
        finetune(case.student(), case.chunks_NL[:5], case.teacher, steps=1, config=case.config)
    with pytest.raises(ValueError, match="steps"):
        run(case, case.student(), steps=0)
    one_NL = case.chunks_NL[:, :1]
    teacher = Teacher.of(case.dense, one_NL)
    with pytest.raises(ValueError, match="no next token"):
        finetune(case.student(), one_NL, teacher, steps=1, config=case.config)
    with pytest.raises(ValueError, match="dtype=float32"):
        run(case, case.student().bfloat16())


def test_schedule():
    rates = [learning_rate(step, 50, 1.0) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([1 - 0.98 * i / 44 for i in range(45)])
    assert learning_rate(0, 1, 1.0) == 1.0


def test_every_epoch_visits_every_sequence_once():
    visits = [row for step in range(15) for row in sequences_of(step, 3, 9, seed=4)]
    epochs = [visits[start : start + 9] for start in range(0, 45, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert visits != [row for step in range(15) for row in sequences_of(step, 3, 9, seed=5)]


@pytest.mark.parametrize("settings", [{}, {"trainable": "low_rank"}])
def test_the_plan_leaves_the_model_as_it_was(tiny_model, monkeypatch, settings):
    case = make_case(tiny_model, **settings)
    model = case.student()
    before = weights_of(model)
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    # every interval takes a second of this clock: 1 s a step and 1/8 s for each of its 2 sequences
    assert plan_steps(model, case.dense, case.chunks_NL, minutes=0.5, config=case.config) == int(30 / 1.25)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="minutes"):
        plan_steps(model, case.dense, case.chunks_NL, minutes=0, config=case.config)


def test_the_trained_set_is_restored_after_an_error(tiny_model):
    model = make_case(tiny_model).student()
    before = weights_of(model)
    for trainable in ("all", "low_rank"):
        config = make_case(tiny_model, trainable=trainable).config
        with pytest.raises(KeyError), trainable_weights(model, config):
            raise KeyError
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
