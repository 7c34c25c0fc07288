"""The chunked loss against plain autograd, and the teacher's states against the models' own logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from monge.conversion import distillation
from monge.conversion.distillation import IGNORED, distillation_loss
from monge.conversion.teacher import Head, Teacher, hidden_states

T, H, V = 13, 6, 37


def random_head(**options):
    bias = torch.randn(V, dtype=torch.float64) if options.pop("biased", False) else None
    return Head(torch.randn(V, H, dtype=torch.float64), bias, **options)


def reference(hidden, head, teacher, teacher_head, targets):
    log_q, log_p = head.logits(hidden).log_softmax(1), teacher_head.logits(teacher).log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    return 2 * kl + F.cross_entropy(head.logits(hidden), targets, ignore_index=IGNORED), kl


@pytest.mark.parametrize("chunk", [1, 4, T, 100])
@pytest.mark.parametrize(
    "options", [{}, {"biased": True, "scale": 0.3}, {"scale": 2.0, "softcap": 3.0, "biased": True}]
)
def test_value_and_gradient(monkeypatch, chunk, options):
    monkeypatch.setattr(distillation, "CHUNK_BYTES", chunk * V * 8)
    head, teacher_head = random_head(**options), random_head(**options)
    hidden = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(T, H, dtype=torch.float64)
    targets = torch.randint(0, V, (T,))
    targets[[3, T - 1]] = IGNORED
    expected, expected_kl = reference(hidden, head, teacher, teacher_head, targets)
    (expected_grad,) = torch.autograd.grad(3 * expected, hidden)
    losses = distillation_loss(hidden, head, teacher, teacher_head, targets)
    (grad,) = torch.autograd.grad(3 * losses.total, hidden)
    torch.testing.assert_close(losses.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.kl, expected_kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)
    assert not losses.kl.requires_grad
    assert not losses.ce.requires_grad


def test_no_gradient_from_a_perfect_student_but_that_of_the_next_token():
    head, hidden = random_head(), torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    none = torch.full((T,), IGNORED)
    losses = distillation_loss(hidden, head, hidden.detach(), head, none)
    (grad,) = torch.autograd.grad(losses.total, hidden)
    assert losses.total.abs() < 1e-12
    assert grad.abs().max() < 1e-12


def test_without_gradients_nothing_is_kept():
    head, hidden = random_head(), torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        losses = distillation_loss(hidden, head, hidden, random_head(), torch.arange(T))
    assert losses.total.grad_fn is None
    assert losses.kl > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "gemma2", "gpt2"])
def test_teacher_gives_the_models_own_logits(tiny_model, tiny_inputs, family):
    special = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 2.0}}
    model = tiny_model(family, **special.get(family, {}))
    tokens_NL = tiny_inputs(model, sequences=7, length=9)["input_ids"]
    with torch.no_grad():
        expected_NLV = model(input_ids=tokens_NL).logits
        exact_NLV = Head.of(model).logits(hidden_states(model, tokens_NL))
    torch.testing.assert_close(exact_NLV, expected_NLV, rtol=1e-5, atol=1e-5)
    teacher = Teacher.of(model.train(), tokens_NL)
    assert model.training, "the mode of the model is restored"
    cached_NLV = teacher.head.logits(teacher.states_NLH.float())
    p, q = expected_NLV.log_softmax(-1), cached_NLV.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).max() < 1e-5  # float16 states


def test_an_unknown_step_before_the_logits_is_noticed(tiny_model, tiny_inputs):
    model = tiny_model("granite", logits_scaling=3.0)
    tokens_NL = tiny_inputs(model)["input_ids"]
    model.config.logits_scaling = 1.0
    inner, model.lm_head.forward = model.lm_head.forward, lambda x: inner(x).tanh()
    with pytest.raises(ValueError, match="do not follow from its last hidden states"):
        Teacher.of(model, tokens_NL)


def test_a_model_without_a_head_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no language-model head"):
        Head.of(tiny_model("bert"))


def test_states_that_overflow_are_refused(tiny_model, tiny_inputs):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with pytest.raises(ValueError, match="NaN or beyond"):
        Teacher.of(model, tiny_inputs(model)["input_ids"])


def test_teacher_on_disk(tiny_model, tiny_inputs, tmp_path):
    model = tiny_model("llama")
    teacher = Teacher.of(model, tiny_inputs(model)["input_ids"])
    path = tmp_path / "teacher.safetensors"
    teacher.save(path)
    assert torch.equal(Teacher.load(path, teacher.head).states_NLH, teacher.states_NLH)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="Delete it"):
        Teacher.load(path, teacher.head)
