"""Routers with state: what forward collects and `monge.step` turns into prices and counters.

A training forward only adds to one flat accumulator of E + 1 floats. `monge.step`, once per optimizer step,
sums the accumulators of all ranks and calls `advance`. So gradient accumulation, data parallelism and
activation checkpointing all see one update per optimizer step, computed from every token once.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monge.routing.router import Batch, Router
from monge.routing.types import Routing


@torch.library.custom_op("monge::accumulate", mutates_args=("total",))
def accumulate(total: Tensor, value: Tensor) -> None:
    """``total += value``, unless inside a backward pass, where activation checkpointing repeats a forward.

    An operator, so that the question is asked when the code runs, compiled or not, and breaks no graph.
    """
    if torch._C._current_graph_task_id() == -1:
        total.add_(value)


@accumulate.register_fake
def _(total: Tensor, value: Tensor) -> None:
    return None


def wide(device: torch.device) -> torch.dtype:
    """float64, in which the mean of equal values is that value; float32 where a device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class SteppedRouter(Router):
    """A router that `monge.step` advances once per optimizer step.

    A method registers its state with ``register_state``; a state named ``steps`` counts the calls. The
    accumulator is no buffer: data parallelism would overwrite it with that of rank 0, and a checkpoint has no
    use for it.
    """

    needs_step = True
    steps: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, **common: Any) -> None:
        super().__init__(dim, num_experts, top_k, **common)
        self._collected = self._nothing(self.weight.device)
        self._weight_version: int | None = None  # at the first training forward since the last step
        self._warned = False

    # ------------------------------------------------------------------ what a method overrides

    def update(self, mean_E: Tensor, seen: Tensor) -> None:
        """Take one step from the token-weighted mean of what was collected, wherever ``seen``.

        Args:
            mean_E: (E,) mean over all tokens of all micro-batches and ranks, in `wide` precision.
            seen: scalar bool tensor, whether there was any token; state must keep its value otherwise.
        """

    def blend_prices(self, mean_E: Tensor, seen: Tensor, momentum: float) -> None:
        """``prices <- momentum * prices + (1 - momentum) * mean_E``, as several methods update."""
        prices: Tensor = self.get_buffer("prices")
        prices.copy_(torch.where(seen, prices.lerp(mean_E.to(prices.dtype), 1 - momentum), prices))

    # ------------------------------------------------------------------ collecting

    @property
    def collecting(self) -> bool:
        """Whether forwards count: in training mode, and not while ``training_routes`` measures."""
        return self.training and not self.route_as_in_training

    def collect(self, values_E: Tensor, batch: Batch) -> None:
        """Count finite ``values_E`` (E,), which speak for the valid tokens of a batch, in the next update."""
        if not self.collecting:
            return
        tokens = batch.num_valid().to(wide(values_E.device))
        sums_E = values_E.detach().to(tokens.dtype) * tokens
        if self._collected.device != sums_E.device:  # the weight was moved by hand, say off the meta device
            self._collected = self._nothing(sums_E.device)
        accumulate(self._collected, torch.cat([sums_E, tokens[None]]))

    def forward(self, hidden: Tensor, mask: Tensor | None = None, token_ids: Tensor | None = None) -> Routing:
        if self.collecting and self.needs_step and not torch.compiler.is_compiling():
            self._warn_without_step()
        return super().forward(hidden, mask, token_ids)

    def _warn_without_step(self) -> None:
        """Warn once if the optimizer wrote the weight since this step began: `monge.step` was forgotten."""
        version = self.weight._version
        if self._weight_version is None:
            self._weight_version = version
        elif version != self._weight_version and not self._warned:
            self._warned = True
            warnings.warn(
                f"training goes on without monge.step: the weight of a {type(self).__name__} router was "
                "updated, but its prices and counters were not. Call monge.step(model) after every "
                "optimizer.step()",
                RuntimeWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------ stepping

    @property
    def collected(self) -> Tensor:
        """(E + 1,) in `wide` precision: sum over tokens of what was collected since the last step, then their
        number."""
        return self._collected

    @torch.no_grad()
    def advance(self, total: Tensor) -> None:
        """One step from ``total``, the sum of ``collected`` over all ranks; clears the accumulator."""
        tokens = total[-1]
        self.update(total[:-1] / tokens.clamp(min=1), tokens > 0)
        if "steps" in self._state_names:
            self.steps += 1
        self._clear()

    def _nothing(self, device: torch.device) -> Tensor:
        return torch.zeros(self.num_experts + 1, device=device, dtype=wide(device))

    def _clear(self) -> None:
        self._collected.zero_()
        self._weight_version = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._collected.is_meta:
            self._collected = self._nothing(self.weight.device)
        self._collected = self._collected.to(self.weight.device, wide(self.weight.device))
        self._weight_version = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._clear()
