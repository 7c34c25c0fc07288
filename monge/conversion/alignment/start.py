"""Where joint training starts: which neurons are shared, and the affinities and router of every layer.

Shapes: T tokens, H model width, F neurons, R routed neurons, N routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monge.conversion.alignment.config import AlignmentConfig
from monge.conversion.alignment.masks import NeuronMask, output_projection
from monge.conversion.partition.neurons import split_off, with_shared
from monge.conversion.types import FFN, ExpertShape, Partition

ROUTER_STD = 0.02  # of drawn routers, as transformers initialises a linear layer
SAMPLED_CHUNKS = 8  # enough tokens to rank neurons by energy


def starting_masks(
    ffns: Sequence[FFN],
    shapes: Sequence[ExpertShape],
    partitions: Sequence[Partition],
    routers: Sequence[Tensor | None],
    config: AlignmentConfig,
    *,
    head_start: float,
    seed: int,
) -> list[NeuronMask]:
    """The masks of step 0.

    Where partitions are learned, ``A = head_start * [f is labelled e] + affinity_std * noise``. A missing
    router is drawn.
    """
    masks = []
    for i, (ffn, shape, partition, router_NH) in enumerate(
        zip(ffns, shapes, partitions, routers, strict=True)
    ):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        labels_F = partition.labels_F
        device = labels_F.device
        if router_NH is None:
            width = ffn.read().up_FH.shape[1]
            router_NH = (ROUTER_STD * torch.randn(shape.routed, width, generator=generator)).to(device)
        affinity_FN = None
        if config.learn_partition:
            noise_FN = torch.randn(len(labels_F), shape.routed, generator=generator).to(device)
            own_FN = labels_F[:, None] == torch.arange(shape.routed, device=device)
            affinity_FN = config.affinity_std * noise_FN + head_start * own_FN
        masks.append(NeuronMask(Partition(labels_F, router_NH), shape.top_k, affinity_FN))
    return masks


def unlearned_partitions(
    model: nn.Module, ffns: Sequence[FFN], shapes: Sequence[ExpertShape], chunks: Sequence[Tensor]
) -> list[Partition]:
    """Partitions that share the neurons of largest energy and deal the others out in order."""
    energies: list[Tensor | None] = [None] * len(ffns)
    if any(shape.shared_neurons for shape in shapes):
        energies = list(neuron_energies(model, ffns, chunks))
    partitions = []
    for ffn, shape, energy_F in zip(ffns, shapes, energies, strict=True):
        if energy_F is None:
            energy_F = torch.zeros(shape.neurons, device=next(ffn.input_module.parameters()).device)
        routed_R = split_off(energy_F, shape)
        dealt_R = torch.arange(len(routed_R), device=routed_R.device) % shape.routed
        partitions.append(Partition(with_shared(routed_R, dealt_R, shape)))
    return partitions


@torch.no_grad()
def neuron_energies(model: nn.Module, ffns: Sequence[FFN], chunks: Sequence[Tensor]) -> list[Tensor]:
    """(F,) float64 of every FFN, ``mean_t h_tf^2 |Wd_f|^2`` over the first chunks of tokens."""
    sums: list[Tensor] = []

    def add(i: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden_TF = args[0].reshape(-1, args[0].shape[-1])
        sums[i] += hidden_TF.double().square().mean(dim=0)

    sampled = [chunks[i] for i in range(min(len(chunks), SAMPLED_CHUNKS))]
    with ExitStack() as hooks:
        for i, ffn in enumerate(ffns):
            down_HF = ffn.read().down_HF
            sums.append(torch.zeros(down_HF.shape[1], dtype=torch.float64, device=down_HF.device))
            hooks.callback(output_projection(ffn).register_forward_pre_hook(partial(add, i)).remove)
        for tokens_BL in sampled:
            model(input_ids=tokens_BL, use_cache=False)
    norms = [ffn.read().down_HF.double().square().sum(dim=0) for ffn in ffns]
    return [total_F / len(sampled) * norm_F for total_F, norm_F in zip(sums, norms)]
