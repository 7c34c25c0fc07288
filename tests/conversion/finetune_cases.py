"""A tiny converted model, its dense source, learnable text and the teacher's states for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from converted_models import convert_by_hand
from torch import Tensor

from monge.conversion.config import ConvertConfig
from monge.conversion.teacher import Teacher


class Case(NamedTuple):
    student: Callable[[], Any]
    dense: Any
    chunks_NL: Tensor
    teacher: Teacher
    config: ConvertConfig


def make_case(tiny_model: Callable[..., Any], family: str = "llama", **settings: Any) -> Case:
    """Twelve sequences of sixteen tokens that count upwards, so that there is something to learn."""
    config = ConvertConfig(**{"batch": 2, "length": 16, "rank": 4, "rate": 3e-3, "seed": 3, **settings})
    dense = tiny_model(family)
    start_N = torch.randint(0, 300, (12,), generator=torch.Generator().manual_seed(0))
    chunks_NL = (start_N[:, None] + torch.arange(16)) % 300

    def student() -> Any:
        return convert_by_hand(tiny_model(family), {"input_ids": chunks_NL[:4]}, gates=config.gates)

    return Case(student, dense, chunks_NL, Teacher.of(dense, chunks_NL), config)


def weights_of(model: Any) -> dict[str, Tensor]:
    """Copies, by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}
