"""A small experiment: made-up text in a dozen files, and settings that train a run in under a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from monge.lab import CompareConfig

WORDS = ["sun", "moon", "river", "stone", "light", "hill", "falls", "runs", "warm", "slowly", "over", "the"]


def write_text(folder: Path, files: int = 12, words: int = 600) -> str:
    """`files` files of seeded random words; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        draw = random.Random(index)
        (folder / f"{index:02d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(words)))
    return str(folder / "*.txt")


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., CompareConfig]:
    """Settings of a tiny experiment on made-up text; keyword arguments replace fields."""
    text = write_text(tmp_path / "text")

    def make(**fields) -> CompareConfig:
        settings = {
            "routers": ("dense", "topk", "maxscore"),
            "seeds": 1,
            "text": (text,),
            "vocab": 300,
            "val_tokens": 512,
            "layers": 1,
            "width": 16,
            "heads": 2,
            "context": 16,
            "experts": 4,
            "top_k": 2,
            "expert_width": 8,
            "steps": 20,
            "batch": 4,
            "warmup": 4,
            "ssr_probability": 0.5,
            "log_every": 5,
            "load_every": 5,
            "eval_every": 8,
            "checkpoint_every": 4,
            "threads": 1,
        }
        return CompareConfig(**{**settings, **fields})

    return make
