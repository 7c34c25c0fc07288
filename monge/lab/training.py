"""One run: a router and a seed, trained step by step, recorded, resumed bit for bit after an interruption.

A step depends on the weights, AdamW's moments, the seed and its own number alone: which windows it sees and
every random number follow from (seed, step). So a checkpoint holds no generator and no data loader.

Shapes: L MoE layers, E experts, N steps so far.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from monge.lab.config import ExperimentConfig
from monge.lab.evaluation import mean_loss
from monge.lab.examples import Data, losses_of
from monge.lab.loads import LoadCounter, max_violation
from monge.lab.models import moe_layers, static_capacity
from monge.lab.observer import Observer
from monge.lab.optimisation import batch_rows, learning_rate, make_optimizer
from monge.routing import aux_loss, use_group
from monge.routing import step as advance
from monge.workspace.checkpoints import load_checkpoint, save_checkpoint
from monge.workspace.ranks import ALONE, Ranks
from monge.workspace.records import Records

QUICK_VALIDATION = 16  # losses along the way use this fraction of the validation set


@dataclass(slots=True)
class History:
    """What every step so far left behind: loss (nats), milliseconds, and the violation of each MoE layer."""

    loss: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    violation: list[list[float]] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor(getattr(self, name), dtype=torch.float64)
            for name in ("loss", "ms", "violation")
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> History:
        return cls(**{name: value.tolist() for name, value in tensors.items()})

    def train_max_violation(self) -> float | None:
        """Mean over the last quarter of the steps and over layers, or None without MoE layers."""
        last = self.violation[-max(1, len(self.violation) // 4) :]
        return statistics.fmean(v for row in last for v in row) if any(last) else None


@dataclass(frozen=True, slots=True)
class Run:
    """One router with one seed, and where its traces go."""

    router: str
    seed: int
    config: ExperimentConfig
    data: Data
    records: Records
    checkpoint: Path
    observer: Observer
    ranks: Ranks = ALONE
    """The processes that share every batch; the first leaves the traces."""

    def record(self, kind: str, step: int, **values: Any) -> None:
        self.records.append({"kind": kind, "router": self.router, "seed": self.seed, "step": step, **values})


def train(model: nn.Module, run: Run) -> History:
    """Train `model` to the last step, from the run's checkpoint where there is one.

    Raises:
        ValueError: the loss is no longer finite; the message names the step.
        OSError: a record or checkpoint could not be written.
    """
    config = run.config
    optimizer = make_optimizer(model, config)
    history = History()
    if run.checkpoint.exists():
        history = History.of(load_checkpoint(run.checkpoint, model, optimizer))
        run.observer.message(f"{run.router}, seed {run.seed}: going on after step {len(history.loss)}")
    here = {"router": run.router, "seed": run.seed}.items()
    # what came after the checkpoint will happen again
    if run.ranks.first:
        run.records.keep(lambda row: not here <= row.items() or row["step"] <= len(history.loss))
    model.train()
    for step in range(len(history.loss), config.steps):
        loads_LE = _step(model, optimizer, run, step, history)
        if run.ranks.first:
            _trace(model, optimizer, run, history, loads_LE)
    return history


@contextmanager
def shared_routing(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """The routers of ``model`` balance over the batch of all processes meanwhile."""
    if ranks.size == 1 or not moe_layers(model):
        yield
        return
    use_group(model, dist.group.WORLD)
    try:
        yield
    finally:
        use_group(model, None)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    step: int,
    history: History,
) -> Tensor:
    """One optimizer step, added to `history`. Returns (L, E) slots per expert."""
    config = run.config
    train = run.data.train
    rows = run.ranks.share(batch_rows(len(train), config.batch, run.seed, step))
    batch = train.take(rows).to(config.device)
    began = time.perf_counter()
    torch.manual_seed(run.seed * 1_000_003 + step + (run.ranks.rank << 40))  # noise of its own for each rank
    with LoadCounter(model) as counter:
        loss = losses_of(model, batch).mean()
    has_routers = bool(moe_layers(model))
    (loss + aux_loss(model) if has_routers else loss).backward()
    run.ranks.average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if has_routers:
        advance(model)
    (value,) = run.ranks.mean([loss.item()])
    if not math.isfinite(value):
        raise ValueError(
            f"{run.router}, seed {run.seed}: the loss became {value} at step {step + 1}. "
            f"Lower lr (now {config.lr:g}) or clip (now {config.clip:g})."
        )
    loads_LE = run.ranks.total(counter.take())
    history.loss.append(value)
    history.ms.append(1000 * (time.perf_counter() - began))
    history.violation.append(max_violation(loads_LE).tolist())
    return loads_LE


def _trace(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, history: History, loads_LE: Tensor
) -> None:
    """Leave a step's traces; records before the checkpoint, which must never be ahead of them."""
    config, step = run.config, len(history.loss)
    since = (step - 1) % config.log_every + 1
    tokens_per_s = 1000 * config.batch * run.data.tokens_per_example / statistics.fmean(history.ms[-since:])
    violation = [statistics.fmean(row) for row in history.violation[-since:] if row]
    if step % config.log_every == 0 or step == config.steps:
        run.record(
            "train",
            step,
            loss=statistics.fmean(history.loss[-since:]),
            tokens_per_s=tokens_per_s,
            max_violation=statistics.fmean(violation) if violation else None,
            lr=learning_rate(step - 1, config),
        )
    if step % config.load_every == 0:
        shares_LE = loads_LE / loads_LE.sum(dim=-1, keepdim=True)
        for layer, shares_E in enumerate(shares_LE.tolist()):
            run.record("load", step, layer=layer, loads=shares_E)
    if step % config.eval_every == 0 and step < config.steps:
        part = run.data.val.take(slice(-(-len(run.data.val) // QUICK_VALIDATION)))
        with static_capacity(model, None):
            run.record("val", step, val_loss=mean_loss(model, part, config))
    if step % config.checkpoint_every == 0 or step == config.steps:
        save_checkpoint(run.checkpoint, model, optimizer, history.tensors())
    run.observer.step(
        run.router,
        run.seed,
        step,
        config.steps,
        history.loss[-1],
        tokens_per_s,
        violation[-1] if violation else None,
    )
