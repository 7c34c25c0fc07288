"""Minutes of fine-tuning, turned into a number of steps before the first."""

from __future__ import annotations

import statistics
import time

from torch import Tensor, nn

from monge.conversion.config import ConvertConfig
from monge.conversion.finetune import TrainStep, make_optimizer
from monge.conversion.teacher import Head, Teacher
from monge.conversion.trainable import trainable_weights
from monge.workspace.ranks import ALONE, Ranks

TIMED = 3  # steps, after one that warms up


def plan_steps(
    model: nn.Module,
    dense: nn.Module,
    chunks_NL: Tensor,
    *,
    minutes: float,
    config: ConvertConfig,
    ranks: Ranks = ALONE,
) -> int:
    """The steps that fit into ``minutes`` of wall time on this machine, at least one.

    ``60 minutes / (s + batch t / R)``: s seconds of a step of R processes (median of three) and t seconds of
    the teacher's pass over one sequence, both measured here; every step takes sequences of its own. The
    weights are afterwards what they were, since the rate is 0. The number belongs into the run's settings: it
    depends on how busy the machine is, and the run that follows must not.

    Args:
        chunks_NL: sequences (N, L) to measure on; four steps' are enough, fewer are used repeatedly.
        ranks: the processes that will share the steps; the first one's number holds for all.

    Raises:
        ValueError: ``minutes`` is not positive, or what `finetune` and `Teacher.of` raise.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}: 0 minutes of fine-tuning need no plan")
    few_NL = chunks_NL[: config.batch * (TIMED + 1)]
    Teacher.of(dense, few_NL)  # the first products are slower than all later ones
    began = time.perf_counter()
    teacher = Teacher.of(dense, few_NL)
    per_sequence = (time.perf_counter() - began) / len(few_NL)
    seconds = []
    with trainable_weights(model, config) as parameters:
        head = Head.of(model, few_NL[:1, :8])
        train_step = TrainStep(model, head, few_NL, teacher, config, ranks)
        optimizer = make_optimizer(parameters)
        for step in range(TIMED + 1):
            began = time.perf_counter()
            train_step(optimizer, step, 0.0)
            seconds.append(time.perf_counter() - began)
    per_step = statistics.median(seconds[1:]) + config.batch * per_sequence / ranks.size
    return ranks.decided(max(1, int(60 * minutes / per_step)))
