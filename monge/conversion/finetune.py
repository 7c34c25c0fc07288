"""Fine-tuning of a converted model on the words of its dense source: 2 KL + cross-entropy, AdamW.

A step depends on the weights, AdamW's moments, the seed and its own number alone, so a run that is
interrupted at any moment goes on from its last checkpoint to the same last bit (at the same number of
threads). Nothing here needs an MoE: the narrower models of static pruning and the dense model itself (the
control, which shows what is mere adaptation to the text) are trained by the same lines.

Shapes: N sequences of L tokens, B of them in a step, M sequences of selection text.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from monge.conversion.config import ConvertConfig
from monge.conversion.distillation import IGNORED, distillation_loss
from monge.conversion.finetune_result import FinetuneResult
from monge.conversion.observer import Observer, Silent
from monge.conversion.schedule import learning_rate, sequences_of
from monge.conversion.teacher import Head, Teacher, hidden_states
from monge.conversion.trainable import trainable_weights
from monge.moe.compute.float32_products import fast_float32
from monge.workspace.checkpoints import load_checkpoint, save_checkpoint
from monge.workspace.ranks import ALONE, Ranks
from monge.workspace.records import Records

BETAS = (0.9, 0.99)
CLIP = 1.0
RECORD_EVERY = 10  # steps
CHECKPOINT_SECONDS = 300.0  # the result does not depend on when checkpoints are written
SELECTIONS = 8  # evaluations on the selection text
WINDOW = 10  # steps whose mean loss is watched


def finetune(
    model: nn.Module,
    chunks_NL: Tensor,
    teacher: Teacher,
    *,
    steps: int,
    config: ConvertConfig,
    checkpoint: Path | None = None,
    observer: Observer | None = None,
    records: Records | None = None,
    selection: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> FinetuneResult:
    """Train ``model`` in place for ``steps`` steps of ``config.batch`` sequences.

    The loss is ``2 KL(teacher || model) + cross-entropy of the next token``; the optimizer AdamW (betas .9
    and .99, no decay), the gradient clipped to norm 1, the rate `learning_rate` with peak ``config.rate``.
    Trained is what ``config.trainable`` says (`trainable_weights`); everything else, and which parameters
    require a gradient, is afterwards as before.

    Args:
        model: converted, narrowed or dense, float32 weights.
        chunks_NL: int64 token ids.
        teacher: `Teacher.of` the dense model on these very sequences.
        steps: from `plan_steps`, or any number.
        checkpoint: where to write the state every five minutes and at the end, and to go on from where it
            exists.
        records: gets a row {"kind": "train", "stage": "finetune", step, steps, loss, kl, ce, rate} every ten
            steps, means over them.
        selection: token ids (M, L) of text that is not trained on. The perplexity on it is taken at the start
            and eight times more, and the best weights are kept.
        ranks: the processes that share every step, each with its part of the sequences, all of them calling
            this alike. The first one writes; the result is that of one process, to rounding.

    Returns:
        The losses of all steps, and what the selection said.

    Raises:
        ValueError: the sequences and the teacher's states do not fit, the model has no head or no float32
            weights, the batch does not divide among the processes, the loss diverges, or the checkpoint is
            damaged or of another run.
        OSError: a record or the checkpoint could not be written.

    Source: arXiv 2606.01666 (the loss).
    """
    _check(chunks_NL, teacher, steps)
    ranks.check_batch(config.batch)
    observer = observer or Silent()
    observer.stage("finetune", steps)
    with trainable_weights(model, config) as parameters:
        head = Head.of(model, chunks_NL[:1, :8])
        train_step = TrainStep(model, head, chunks_NL, teacher, config, ranks)
        ranks.start_alike(parameters)
        optimizer = make_optimizer(parameters)
        state = nn.ParameterList(parameters)
        history = FinetuneResult(identity=_identity(chunks_NL, steps, config))
        if checkpoint is not None and checkpoint.exists():
            history.read(load_checkpoint(checkpoint, state, optimizer), checkpoint)
            observer.advance(history.steps, "resumed")
        if records is not None:  # what came after the checkpoint will happen again
            records.keep(lambda row: row.get("stage") != "finetune" or row["step"] <= history.steps)
        if selection is not None and not history.selection:
            history.select(0, perplexity_of(model, head, selection), parameters)
        written = time.monotonic()
        for step in range(history.steps, steps):
            done = step + 1
            history.add(*train_step(optimizer, step, learning_rate(step, steps, config.rate)))
            _watch(history, config)
            if selection is not None and (done % max(1, steps // SELECTIONS) == 0 or done == steps):
                history.select(done, perplexity_of(model, head, selection), parameters)
            if records is not None and (done % RECORD_EVERY == 0 or done == steps):
                records.append(_record(history, steps, config))
            late = time.monotonic() - written >= CHECKPOINT_SECONDS
            if checkpoint is not None and ranks.first and (late or done == steps):
                save_checkpoint(checkpoint, state, optimizer, history.tensors())
                written = time.monotonic()
            observer.advance(1, f"loss {history.loss[-1]:.3f}")
        history.restore_best(parameters)
    return history


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW without decay; the rate is set step by step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class TrainStep:
    """A step of training on sequences (N, L) with the teacher's states for them; ``head`` is the model's.

    Each of ``ranks`` takes its share of the sequences; the step is that of all of them.
    """

    model: nn.Module
    head: Head
    chunks_NL: Tensor
    teacher: Teacher
    config: ConvertConfig
    ranks: Ranks = ALONE

    def __call__(
        self, optimizer: torch.optim.Optimizer, step: int, rate: float
    ) -> tuple[float, float, float]:
        """The step of that number, from 0. Returns its loss, KL and cross-entropy, before the update.

        Raises:
            ValueError: the loss or its gradient is not finite; the weights are then as they were.
        """
        rows = self.ranks.share(sequences_of(step, self.config.batch, len(self.chunks_NL), self.config.seed))
        tokens_BL = self.chunks_NL[rows].to(self.head.weight_VH.device)
        targets_BL = torch.full_like(tokens_BL, IGNORED)
        targets_BL[:, :-1] = tokens_BL[:, 1:]
        states_TH = self.teacher.states_NLH[rows].flatten(0, 1)
        with fast_float32():
            hidden_TH = hidden_states(self.model, tokens_BL).flatten(0, 1)
            losses = distillation_loss(
                hidden_TH, self.head, states_TH, self.teacher.head, targets_BL.flatten()
            )
            losses.total.backward()
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.ranks.average_gradients(weights)
        norm = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        loss, kl, ce = self.ranks.mean([part.item() for part in losses])
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            optimizer.zero_grad()
            raise _diverged(step, f"is {loss} with a gradient of norm {norm.item()}", self.config)
        if norm > CLIP:
            nn.utils.clip_grads_with_norm_(weights, CLIP, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        return loss, kl, ce


@torch.no_grad()
def perplexity_of(model: nn.Module, head: Head, chunks_ML: Tensor) -> float:
    """exp of the mean cross-entropy of the next token."""
    nats = 0.0
    for tokens_L in chunks_ML.to(head.weight_VH.device):
        logits_LV = head.logits(hidden_states(model, tokens_L[None])[0, :-1])
        nats += nn.functional.cross_entropy(logits_LV, tokens_L[1:], reduction="sum").item()
    return math.exp(nats / (len(chunks_ML) * (chunks_ML.shape[1] - 1)))


def _check(chunks_NL: Tensor, teacher: Teacher, steps: int) -> None:
    states = tuple(teacher.states_NLH.shape)
    if chunks_NL.dim() != 2 or not len(chunks_NL) or tuple(chunks_NL.shape) != states[:2]:
        raise ValueError(
            f"the sequences are {tuple(chunks_NL.shape)} and the teacher's states {states}: "
            "build the teacher on these sequences, Teacher.of(dense, chunks_NL)"
        )
    if chunks_NL.shape[1] < 2:
        raise ValueError("sequences of fewer than 2 tokens have no next token: raise --length")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: raise --minutes")


def _identity(chunks_NL: Tensor, steps: int, config: ConvertConfig) -> list[float]:
    """What makes one run another; a checkpoint of it would be wrong here."""
    low_rank = float(config.rank if config.trainable == "low_rank" else 0)
    return [float(steps), float(chunks_NL.sum()), config.batch, config.seed, config.rate, low_rank]


def _record(history: FinetuneResult, steps: int, config: ConvertConfig) -> dict[str, str | int | float]:
    since = (history.steps - 1) % RECORD_EVERY + 1
    means = {name: statistics.fmean(getattr(history, name)[-since:]) for name in ("loss", "kl", "ce")}
    rate = learning_rate(history.steps - 1, steps, config.rate)
    return {
        "kind": "train",
        "stage": "finetune",
        "step": history.steps,
        "steps": steps,
        **means,
        "rate": rate,
    }


def _watch(history: FinetuneResult, config: ConvertConfig) -> None:
    first, last = history.loss[0], statistics.fmean(history.loss[-WINDOW:])
    if history.steps >= WINDOW and last > 2 * first + 1:  # a loss near 0 may well double
        raise _diverged(history.steps - 1, f"has risen from {first:.2f} to {last:.2f}", config)


def _diverged(step: int, what: str, config: ConvertConfig) -> ValueError:
    return ValueError(
        f"fine-tuning diverged: the loss {what} at step {step + 1}. Lower --rate (now {config.rate:g}) or "
        f"raise --batch (now {config.batch})."
    )
