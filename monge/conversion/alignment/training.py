"""Joint training from its arguments to its result.

Shapes: B sequences, L tokens of a sequence, H model width, F neurons, N routed experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from monge.conversion.alignment.config import AlignmentConfig
from monge.conversion.alignment.masks import masked
from monge.conversion.alignment.start import starting_masks, unlearned_partitions
from monge.conversion.alignment.steps import Trainer
from monge.conversion.observer import Observer, Silent
from monge.conversion.types import FFN, ExpertShape, Partition
from monge.workspace.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Aligned:
    """What joint training arrived at.

    Attributes:
        partitions: of every FFN, with its trained router (None where no neuron is routed). The scale of its
            logits is what training made it.
        history: one number a step of ``loss``, ``kl``, ``ce`` (nats per token), ``z``, ``balance``,
            ``changed`` (share of the routed neurons that changed expert) and ``rate`` (share of the peak
            learning rates).
    """

    partitions: list[Partition]
    history: dict[str, list[float]]

    @property
    def routers(self) -> list[Tensor | None]:
        """The router (N, H) of every FFN."""
        return [partition.router_NH for partition in self.partitions]


def align(
    model: nn.Module,
    ffns: Sequence[FFN],
    chunks: Sequence[Tensor],
    shapes: Sequence[ExpertShape],
    *,
    partitions: Sequence[Partition] | None = None,
    routers: Sequence[Tensor | None] | None = None,
    config: AlignmentConfig | None = None,
    steps: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
) -> Aligned:
    """Train the partitions and routers of all layers together through the whole model.

    ``2 KL(dense || sparse) + CE + 1e-3 z-loss + 1e-2 load balance``, with the coefficients of ``config``, by
    AdamW; experts are summed with weight 1. The dense model is the same model with its masks lifted, or a
    frozen copy where the weights are trained too. The model is left dense, in the mode it was in, and with
    its own weights unless ``config.weight_rate`` trains them.

    Args:
        model: a causal language model of transformers (``model(input_ids=...).logits``).
        ffns: its FFNs to convert, in order.
        chunks: (B, L) token batches; step s, from 0, trains on ``chunks[s % len(chunks)]``.
        shapes: how each FFN is divided.
        partitions: where to start, and to stay without ``config.learn_partition``. None starts from
            near-equal affinities and shares the neurons of largest energy.
        routers: (N, H) of every FFN where to start; None takes the partitions' own. Missing ones are drawn.
        config: `AlignmentConfig()` by default.
        steps: optimizer steps.
        seed: of the drawn affinities and routers.
        checkpoint: file to write every ``config.checkpoint_every`` steps and after the last, and to go on
            from where it exists.
        observer: is told of every step.
        ranks: the processes that share the sequences of every step; all call this alike, and the first
            writes the checkpoint.

    Raises:
        ValueError: arguments that do not fit each other, nothing to train, a checkpoint of another run,
            chunks that do not divide among the processes, or a loss that is no longer finite.
        OSError: the checkpoint could not be written.

    Source: DOT-MoE, arXiv 2606.01666.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from monge.conversion.alignment import align
        >>> from monge.conversion.ffn import find_ffns
        >>> from monge.conversion.types import ExpertShape
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
        >>> chunks = [torch.randint(64, (2, 16)) for _ in range(4)]
        >>> shape = ExpertShape(neurons=32, groups=4, active=2, shared=1)
        >>> aligned = align(model, find_ffns(model), chunks, [shape], steps=4)
        >>> aligned.partitions[0].labels_F.add(1).bincount().tolist()  # 8 neurons are shared
        [8, 8, 8, 8]
        >>> aligned.routers[0].shape
        torch.Size([3, 16])
    """
    config = config or AlignmentConfig()
    _check(chunks, shapes, partitions, routers, config, steps)
    if uneven := [len(tokens_BL) for tokens_BL in chunks if len(tokens_BL) % ranks.size]:
        raise ValueError(
            f"a step of {uneven[0]} sequences does not divide among {ranks.size} processes: let --batch, and "
            f"the number of sequences in --tokens, be multiples of {ranks.size}"
        )
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if config.weight_rate else None
    with _frozen(model):
        started = partitions or unlearned_partitions(model, ffns, shapes, chunks)
        masks = starting_masks(
            ffns,
            shapes,
            started,
            routers or [partition.router_NH for partition in started],
            config,
            head_start=config.head_start if partitions else 0.0,
            seed=seed,
        )
        trainer = Trainer(model, masks, config, steps, teacher=teacher, ranks=ranks)
        with masked(ffns, masks):
            history = trainer.run(chunks, checkpoint, observer or Silent())
    return Aligned([mask.partition() for mask in masks], history)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of the model's own inside; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _check(
    chunks: Sequence[Tensor],
    shapes: Sequence[ExpertShape],
    partitions: Sequence[Partition] | None,
    routers: Sequence[Tensor | None] | None,
    config: AlignmentConfig,
    steps: int,
) -> None:
    if steps < 1 or not len(chunks):
        raise ValueError(f"steps and chunks must be at least 1, got {steps} and {len(chunks)}")
    if partitions is None:
        if not config.learn_partition:
            raise ValueError(
                "partitions is None: give them, or let them be learned with learn_partition=True"
            )
        return
    for i, (shape, partition) in enumerate(zip(shapes, partitions, strict=True)):
        labels_F = partition.labels_F
        if labels_F.shape != (shape.neurons,) or int(labels_F.max()) >= shape.routed:
            raise ValueError(
                f"partitions[{i}] has labels {tuple(labels_F.shape)} up to {int(labels_F.max())}, but "
                f"shapes[{i}] has {shape.neurons} neurons and {shape.routed} routed experts"
            )
        router_NH = routers[i] if routers else partition.router_NH
        if router_NH is not None and len(router_NH) != shape.routed:
            raise ValueError(f"routers[{i}] has {len(router_NH)} rows for {shape.routed} routed experts")
