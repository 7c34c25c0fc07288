"""The steps of joint training, resumed bit for bit after an interruption.

A step depends on the state, its number and its chunk alone. A checkpoint holds what is trained, AdamW's
moments and the history.

Shapes: B sequences, L tokens of a sequence, V vocabulary, H model width, N routed experts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from monge.conversion.alignment.config import AlignmentConfig
from monge.conversion.alignment.masks import NeuronMask, lifted
from monge.conversion.alignment.objective import Terms, distance, router_losses
from monge.conversion.observer import Observer
from monge.ot.distributed import LOCAL, RowGroup
from monge.workspace.checkpoints import load_checkpoint, save_checkpoint
from monge.workspace.ranks import ALONE, Ranks

TRACES = ("loss", "kl", "ce", "z", "balance", "changed", "rate")
BETAS = (0.9, 0.99)


class Trainer:
    """Trains ``masks``, which are on ``model`` while it runs, and the model's weights with a ``teacher``.

    Args:
        teacher: a frozen copy of the dense model, or None: the weights stay, and the model is its own teacher
            with the masks lifted.
        ranks: the processes that share every step. All start with the masks of the first.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Sequence[NeuronMask],
        config: AlignmentConfig,
        steps: int,
        *,
        teacher: nn.Module | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks, self.rows = ranks, LOCAL if ranks.size == 1 else RowGroup(dist.group.WORLD)
        self.model, self.masks, self.teacher = model, list(masks), teacher
        self.config, self.steps = config, steps
        weights = _own_weights(model) if teacher is not None else []
        for weight in weights:
            weight.requires_grad_(True)
        self.state = nn.ModuleDict({"masks": nn.ModuleList(self.masks), "weights": nn.ParameterList(weights)})
        self.optimizer = self._make_optimizer(weights)
        for mask in self.masks:
            mask.rounding, mask.router_temperature = config.rounding, config.router_temperature
        ranks.start_alike(self.state.state_dict().values())

    def run(
        self, chunks: Sequence[Tensor], checkpoint: Path | None, observer: Observer
    ) -> dict[str, list[float]]:
        """Every step that is left; the history of all."""
        history: dict[str, list[float]] = {name: [] for name in TRACES}
        observer.stage("joint training", self.steps)
        if checkpoint is not None and checkpoint.exists():
            history = self._resume(checkpoint)
            observer.advance(len(history["loss"]))
        freeze = self.config.freeze_step(self.steps)
        for mask in self.masks:
            mask.learning &= len(history["loss"]) <= freeze
        for step in range(len(history["loss"]), self.steps):
            if step == freeze:
                for mask in self.masks:
                    mask.settle(averaged=True)
            values = self._step(step, chunks[step % len(chunks)])
            for name in TRACES:
                history[name].append(values[name])
            done = step + 1
            due = done % self.config.checkpoint_every == 0 or done == self.steps
            if checkpoint is not None and self.ranks.first and due:
                self._save(checkpoint, history)
            observer.advance(1, f"loss {values['loss']:.3f}")
        for mask in self.masks:
            mask.temperature = self.config.temperature(self.steps, self.steps)
            mask.settle(averaged=False)
        return history

    def _step(self, step: int, tokens_BL: Tensor) -> dict[str, float]:
        config = self.config
        rate = config.rate(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        before = [mask.labels_F.clone() for mask in self.masks]
        for mask in self.masks:
            mask.temperature = config.temperature(step, self.steps)
            mask.estimator = config.estimator if mask.learning else config.settled_estimator
        terms = self._terms(tokens_BL[self.ranks.rank :: self.ranks.size])
        loss = terms.total(config)
        parts = (loss, terms.kl, terms.ce, terms.z, terms.balance)
        value, kl, ce, z, balance = self.ranks.mean([part.item() for part in parts])
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of joint training became {value} at step {step + 1} of {self.steps}: lower the "
                f"rates (affinity {config.affinity_rate:g}, router {config.router_rate:g}, weights "
                f"{config.weight_rate:g})"
            )
        loss.backward()
        self.ranks.average_gradients(self.state.parameters())
        nn.utils.clip_grad_norm_(self.state.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for mask in self.masks:
            mask.remember(config.average)
        return {
            "loss": value,
            "kl": kl,
            "ce": ce,
            "z": z,
            "balance": balance,
            "changed": self._changed(before),
            "rate": rate,
        }

    def _terms(self, tokens_BL: Tensor) -> Terms:
        with torch.no_grad():
            if self.teacher is not None:
                dense_BLV = logits_of(self.teacher, tokens_BL)
            else:
                with lifted(self.masks):
                    dense_BLV = logits_of(self.model, tokens_BL)
        kl, ce = distance(logits_of(self.model, tokens_BL), dense_BLV, tokens_BL)
        routed = [(mask.logits_TN, mask.top_k) for mask in self.masks if mask.logits_TN is not None]
        z, balance = router_losses(routed, self.rows)
        for mask in self.masks:
            mask.logits_TN = None
        return Terms(kl, ce, z, balance)

    def _settings(self) -> Tensor:
        """SHA-256 of what a resumption must have in common with the run that was interrupted."""
        described = repr((self.config, self.steps, [mask.top_k for mask in self.masks]))
        return torch.tensor(list(hashlib.sha256(described.encode()).digest()), dtype=torch.uint8)

    def _save(self, checkpoint: Path, history: dict[str, list[float]]) -> None:
        traces = {name: torch.tensor(trace, dtype=torch.float64) for name, trace in history.items()}
        save_checkpoint(checkpoint, self.state, self.optimizer, {**traces, "settings": self._settings()})

    def _resume(self, checkpoint: Path) -> dict[str, list[float]]:
        stored = load_checkpoint(checkpoint, self.state, self.optimizer)
        if not torch.equal(stored["settings"], self._settings()):
            raise ValueError(
                f"{checkpoint} is of a run with other settings or another number of steps: restore them, or "
                "delete it to train from the beginning"
            )
        return {name: stored[name].tolist() for name in TRACES}

    def _changed(self, before: Sequence[Tensor]) -> float:
        """Share of the routed neurons that are with another expert than ``before``."""
        changed = sum(int((mask.labels_F != old_F).sum()) for mask, old_F in zip(self.masks, before))
        return changed / max(1, sum(int((old_F >= 0).sum()) for old_F in before))

    def _make_optimizer(self, weights: Sequence[nn.Parameter]) -> torch.optim.AdamW:
        config = self.config
        routers = [mask.router_NH for mask in self.masks if mask.router_NH is not None]
        affinities = [mask.affinity_FN for mask in self.masks if mask.affinity_FN is not None]
        peaks = (
            (routers, config.router_rate),
            (affinities, config.affinity_rate),
            (list(weights), config.weight_rate),
        )
        groups = [{"params": parameters, "peak": peak} for parameters, peak in peaks if parameters]
        if not groups:
            raise ValueError("nothing to train: no neuron is routed and weight_rate is 0")
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=config.weight_decay, fused=True)


def logits_of(model: nn.Module, tokens_BL: Tensor) -> Tensor:
    """(B, L, V)."""
    return model(input_ids=tokens_BL, use_cache=False).logits


def _own_weights(model: nn.Module) -> list[nn.Parameter]:
    """All of them but the embeddings' and the head's."""
    outer = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    kept = {id(weight) for module in outer if module is not None for weight in module.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in kept]
