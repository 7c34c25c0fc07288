"""The callback that makes transformers' Trainer train routers of Monge, and tell what they do.

optimizer step --> monge.step;   every N steps --> RouterLog;   checkpoint --> monge_state.safetensors
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from monge.hf.logs import RouterLog
from monge.hf.router import adapters
from monge.hf.saving import STATE, load_state, save_state
from monge.routing import aux_loss, step

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("RouterCallback needs transformers: pip install 'monge[hf]'") from error


class RouterCallback(TrainerCallback):
    """``Trainer(..., callbacks=[monge.hf.RouterCallback()])`` on a model with routers of Monge.

    - `monge.step` after every optimizer step.
    - Auxiliary losses of the routers (``switch``, ``noisy_topk``, ``z_loss``) are added to the loss that the
      model returns in training, scaled for gradient accumulation as Trainer scales that loss. Not with label
      smoothing or ``compute_loss_func``, where Trainer ignores the model's loss: add `monge.aux_loss` there.
    - Loads, violation, dead experts and drops of every layer go to ``records.jsonl`` and TensorBoard
      (`RouterLog`), training apart from evaluation.
    - Prices and counters are saved with every checkpoint, also beside a PEFT adapter, and restored where
      training is resumed from a checkpoint of ``output_dir``. So are the experts, which Trainer by itself
      leaves as they are (their keys in a checkpoint differ from those in the model; it logs that only).

    Args:
        folder: of the records; ``output_dir`` of the Trainer when None.
        every: optimizer steps between records; ``logging_steps`` of the Trainer when None.
        tensorboard: write TensorBoard scalars too; None does if the package is installed.
        capacity_factors: for which the drops of a static capacity are told.

    Examples:
        >>> from monge.hf import RouterCallback
        >>> trainer = Trainer(model, arguments, callbacks=[RouterCallback()])  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        every: int | None = None,
        tensorboard: bool | None = None,
        capacity_factors: tuple[float, ...] = (1.0, 1.25),
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, or None for logging_steps; got {every}")
        self.folder, self.every = folder, every
        self.tensorboard, self.capacity_factors = tensorboard, capacity_factors
        self._log: RouterLog | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.global_step:
            self._resume(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if state.is_world_process_zero:
            tensorboard = _installed("tensorboard") if self.tensorboard is None else self.tensorboard
            self._log = RouterLog(
                model,
                self.folder or args.output_dir,
                tensorboard=tensorboard,
                capacity_factors=self.capacity_factors,
            ).__enter__()
        self._hook = model.register_forward_hook(
            _auxiliary(args.gradient_accumulation_steps), with_kwargs=True
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.every or max(1, int(state.logging_steps or 1))
        if self._log is not None and (state.global_step % every == 0 or control.should_evaluate):
            self._log.write(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log is not None and not self._log.empty:
            self._log.write(state.global_step, phase="evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.is_world_process_zero and any(adapters(model)):
            save_state(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log is not None:
            if not self._log.empty:
                self._log.write(state.global_step)
            self._log.__exit__()
        if self._hook is not None:
            self._hook.remove()
        self._log = self._hook = None

    def _resume(self, model: nn.Module, folder: Path) -> None:
        _reload_experts(model, folder)
        if not any(adapters(model)):
            return  # routers of monge.MoE layers are in the checkpoint itself
        if (folder / STATE).is_file():
            load_state(model, folder)
        else:
            warnings.warn(
                f"training is resumed, but there is no {folder / STATE}: the prices and counters of the "
                "routers start from zero. Before training, call monge.hf.load_state(model, folder)",
                stacklevel=2,
            )


def _reload_experts(model: Any, folder: Path) -> None:
    """Load the whole checkpoint where Trainer has left its experts out.

    Checkpoints hold a key per expert, models one tensor for all. `from_pretrained` translates; Trainer
    (transformers 5.23) loads what has the same name, and only logs that the experts kept their old weights.
    """
    from transformers import PreTrainedModel

    weights = sorted(folder.glob("model*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not weights:
        return
    names: set[str] = set()
    for file in weights:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    if any(".experts." in name for name in set(model.state_dict()) - names):
        whole = type(model).from_pretrained(folder, local_files_only=True, dtype=model.dtype)
        model.load_state_dict(whole.state_dict())


def _auxiliary(accumulation: int) -> Any:
    """A forward hook that adds the routers' auxiliary losses to the loss of a training forward."""

    def add(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None or not model.training:
            return output
        # With this argument Trainer has the model divide its loss, and divides by nothing itself.
        scale = 1 / accumulation if kwargs.get("num_items_in_batch") is not None else 1.0
        output["loss"] = loss + scale * aux_loss(model).to(loss.dtype)
        return output

    return add


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
