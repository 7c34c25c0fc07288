"""A dense FFN that computes as its experts would: a mask on the hidden activations, put there by hooks.

The FFN stays in the model with its own weights; lifting the masks gives back the dense model, the teacher.
``Y = (h * mask) Wd^T`` with ``mask = R M^T``, R (T, N) the experts of each token, M (F, N) the expert of each
neuron. Nothing has more than two dimensions.

Shapes: T tokens, H model width, F neurons, N routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from monge.conversion.alignment.estimators import choose_experts, straight_through
from monge.conversion.types import FFN, SHARED, Partition
from monge.ot import balanced_partition, sinkhorn

ITERATIONS = 50  # of Sinkhorn, as published; a few are enough at these temperatures


class NeuronMask(nn.Module):
    """Which neurons of an FFN a token uses: from the FFN's input x (T, H) to a mask (T, F) of zeros and ones.

    ``choice = top-k of x router^T``; neurons labelled `SHARED` are always on, `DROPPED` ones never. Without
    routed neurons there is no router, and every token has the same mask.

    Args:
        partition: the expert of every neuron, with its router (N, H) where any is routed.
        top_k: routed experts per token.
        affinity_FN: affinities to be learned of every neuron to every expert, or None: the labels are fixed.
            Rows of shared and dropped neurons are ignored.

    Attributes:
        labels_F: of the last forward, int64.
        affinity_FN: parameter, or None.
        router_NH: parameter, or None without routed neurons.
        learning: whether the labels follow the affinities.
        logits_TN: of the last forward, with their gradient; None before.
    """

    labels_F: Tensor
    average_FN: Tensor

    def __init__(self, partition: Partition, top_k: int, affinity_FN: Tensor | None = None) -> None:
        super().__init__()
        self.top_k = top_k
        self.estimator = "softmax"
        self.router_temperature = 0.1
        self.rounding = "exact"
        self.temperature = 1.0
        self.on = True
        self.logits_TN: Tensor | None = None
        self._mask_TF: Tensor | None = None
        labels_F = partition.labels_F
        routed = bool((labels_F >= 0).any())
        if routed and partition.router_NH is None:
            raise ValueError("a partition with routed neurons needs router_NH, got None")
        router = partition.router_NH if routed else None
        self.router_NH = None if router is None else nn.Parameter(router.detach().clone())
        affinity = affinity_FN if routed else None
        self.affinity_FN = None if affinity is None else nn.Parameter(affinity.detach().clone())
        self.learning = affinity is not None
        self.register_buffer("labels_F", labels_F.clone())
        self.register_buffer("average_FN", torch.zeros(0) if affinity is None else torch.zeros_like(affinity))

    def forward(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (T, F)."""
        always_F = (self.labels_F == SHARED).to(x_TH.dtype)
        if self.router_NH is None:
            return always_F.expand(len(x_TH), -1)
        self.logits_TN = nnf.linear(x_TH, self.router_NH.to(x_TH.dtype))
        choice_TN = choose_experts(
            self.logits_TN, self.top_k, self.estimator, temperature=self.router_temperature
        )
        return nnf.linear(choice_TN, self.assignment().to(x_TH.dtype), always_F)

    def assignment(self) -> Tensor:
        """M (F, N), 1 where the neuron belongs to the expert; rows of unrouted neurons are 0.

        While affinities A are learned: the rounding of ``Sinkhorn(A / temperature)``, rows 1 and columns
        equal, with the gradient of that plan (arXiv 2606.01666).
        """
        if self.affinity_FN is None or not self.learning:
            return self._one_hot()
        routed_R = (self.labels_F >= 0).nonzero()[:, 0]
        plan_RN = sinkhorn(self.affinity_FN[routed_R], epsilon=self.temperature, max_iters=ITERATIONS).plan
        self.labels_F[routed_R] = balanced_partition(plan_RN.detach(), method=self.rounding)
        soft_FN = torch.zeros_like(self.affinity_FN).index_copy(
            0, routed_R, plan_RN.to(self.affinity_FN.dtype)
        )
        return straight_through(self._one_hot(), soft_FN)

    def remember(self, decay: float) -> None:
        """Take the labels of the last forward into their exponential average."""
        if self.learning:
            self.average_FN.mul_(decay).add_(self._one_hot(), alpha=1 - decay)

    @torch.no_grad()
    def settle(self, *, averaged: bool) -> None:
        """Fix the labels: those nearest the average, or those of the affinities as they are."""
        if not self.learning:
            return
        if averaged:
            routed_R = (self.labels_F >= 0).nonzero()[:, 0]
            self.labels_F[routed_R] = balanced_partition(self.average_FN[routed_R], method="exact")
        else:
            self.assignment()
        self.learning = False

    def partition(self) -> Partition:
        """The labels and the router as they are."""
        router_NH = None if self.router_NH is None else self.router_NH.detach().clone()
        return Partition(self.labels_F.clone(), router_NH)

    def _one_hot(self) -> Tensor:
        assert self.router_NH is not None
        experts_N = torch.arange(len(self.router_NH), device=self.labels_F.device)
        return (self.labels_F[:, None] == experts_N).to(self.router_NH.dtype)

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.on:
            x_TH = args[0].reshape(-1, args[0].shape[-1])
            self._mask_TF = self(x_TH)

    def _apply_mask(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.on:
            return None
        hidden, *rest = args
        mask_TF, self._mask_TF = self._mask_TF, None
        assert mask_TF is not None
        return (hidden * mask_TF.view(hidden.shape), *rest)


@contextmanager
def masked(ffns: Sequence[FFN], masks: Iterable[NeuronMask]) -> Iterator[None]:
    """The model of ``ffns`` computes through ``masks`` inside, and as before outside.

    ``with masked(ffns, [NeuronMask(partition, top_k), ...]): model(tokens)``

    Raises:
        ValueError: an FFN whose output projection cannot be found, or another number of masks.
    """
    with ExitStack() as hooks:
        for ffn, mask in zip(ffns, masks, strict=True):
            projection = output_projection(ffn)
            for handle in (
                ffn.input_module.register_forward_pre_hook(mask._look),
                projection.register_forward_pre_hook(mask._apply_mask),
            ):
                hooks.callback(handle.remove)
        yield


@contextmanager
def lifted(masks: Iterable[NeuronMask]) -> Iterator[None]:
    """Inside, the masks let everything pass: the dense model."""
    masks = list(masks)
    for mask in masks:
        mask.on = False
    try:
        yield
    finally:
        for mask in masks:
            mask.on = True


def output_projection(ffn: FFN) -> nn.Module:
    """The module that multiplies with Wd, known by its weight (H, F), or (F, H) where inputs come first.

    Raises:
        ValueError: no module of the FFN holds Wd alone.
    """
    down_HF = ffn.read().down_HF
    for module in ffn.output_module.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            for candidate in (weight, weight.T):
                if candidate.shape == down_HF.shape and torch.equal(candidate.float(), down_HF):
                    return module
    raise ValueError(
        f"{ffn.name}: no module inside holds the output projection {tuple(down_HF.shape)} alone, so its "
        "input cannot be masked; use a partition method and a router that need no joint training"
    )
