"""Routing over a training run, for people and for programs: TensorBoard and ``records.jsonl``.

with RouterLog(model, "runs/mine") as log:    training forwards are watched meanwhile
    ...; log.write(step)                      one record per layer and one in total, then from zero
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from monge.monitor import watch

RECORDS = "records.jsonl"


class RouterLog(AbstractContextManager["RouterLog"]):
    """Logs loads, violation, dead experts, drops and the rest of `monge.watch`, layer by layer.

    Every record is a line of JSON with ``kind`` "routing", ``step``, ``phase``, ``layer`` (a path, or
    "total") and the metrics that `monge.watch` explains; a metric covers what ran since the last record.

    Args:
        model: with routers of Monge inside.
        folder: of ``records.jsonl``, made if missing; records are appended.
        tensorboard: also write TensorBoard scalars ``monge/<layer>/<metric>`` there; needs the package.
        capacity_factors: for which the drops of a static capacity are told.

    Raises:
        ValueError: ``model`` has no router of Monge.
        ImportError: TensorBoard is asked for and not installed.

    Examples:
        >>> import tempfile, torch, monge
        >>> layer = monge.MoE(8, 16, 4, 2)
        >>> with monge.hf.RouterLog(layer, tempfile.mkdtemp(), tensorboard=False) as log:
        ...     _ = layer(torch.randn(6, 8))
        ...     total = log.write(step=1)
        >>> total["tokens"]
        6
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        capacity_factors: tuple[float, ...] = (1.0, 1.25),
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self.watch = watch(
            model, capacity_factors=capacity_factors, tensorboard=str(self.folder) if tensorboard else None
        )

    def __enter__(self) -> RouterLog:
        self.watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.__exit__(*error)

    @property
    def empty(self) -> bool:
        """Whether nothing ran since the last record."""
        return not self.watch.routings

    def write(self, step: int, phase: str = "train") -> dict[str, Any]:
        """Write what ran since the last call, begin from zero, and return the metrics of the whole model.

        TensorBoard gets the phase "train" alone: its curves would jump where others are mixed in.

        Raises:
            RuntimeError: nothing ran.
        """
        metrics = self.watch.log(step) if self._tensorboard and phase == "train" else self.watch.metrics()
        self.watch.reset()
        lines = [
            json.dumps({"kind": "routing", "step": step, "phase": phase, "layer": layer, **_plain(values)})
            for layer, values in [*metrics["layers"].items(), ("total", metrics["total"])]
        ]
        with (self.folder / RECORDS).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        return metrics["total"]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has text for keys."""
    return {
        name: {f"{factor:g}": share for factor, share in value.items()} if name == "drops" else value
        for name, value in values.items()
    }
