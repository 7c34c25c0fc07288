"""What is asked of a whole model: `use_group` once, `aux_loss` and `step` in every optimizer step.

Shapes: E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from monge.ot.distributed import RowGroup
from monge.routing.router import Router
from monge.routing.stepped import SteppedRouter


def use_group(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Balance over the batch of all ranks of ``group``, as one process with all their tokens would.

    Without it every rank routes and balances its own tokens, and `step` averages what the ranks found. With
    it the statistics of a forward are those of all ranks:

    - ``ssr``, ``sbase``: one transport plan over all ranks' tokens (messages of E numbers per Sinkhorn
      iteration; the implicit backward sends one E x E matrix);
    - ``prices``, ``quantile``: the step of the prices is taken from all ranks' tokens (order statistics by
      counting: 10 to 20 messages of at most 15 E numbers);
    - ``switch``, ``maxscore``'s loss, ``noisy_topk``, ``z_loss``: auxiliary losses of all ranks' tokens (one
      message of E or 2 E numbers). Each rank's loss is its part; the mean over the ranks, which data
      parallelism takes of the gradients, is the loss of the whole batch;
    - ``maxscore``, ``base`` with ``method="approximate"``: one assignment under capacities of all ranks
      together. With ``method="exact"`` each rank solves its own tokens, and shares the kept prices;
    - ``lossfree`` and ``switch`` with scope "global" need nothing: `step` exchanges exact counts anyway.
      ``expert_choice`` stays a choice among each rank's own tokens, and ``per="sequence"`` one per sequence.

    Every rank must then call every training forward, backward and `step` together, in the same order, a rank
    without tokens too. Evaluation mode exchanges nothing, except inside ``training_routes``.

    Args:
        model: any module with routers inside.
        group: the data-parallel group, ``torch.distributed.group.WORLD`` for all ranks; `step` uses it too.
            A group of its own (``dist.new_group()``) keeps these messages apart from those of DDP or FSDP.
            None goes back to this process alone.

    Raises:
        ValueError: ``model`` has no router, or one that cannot share (SSR with ``backward="unrolled"``).

    Source: arXiv 2501.11873 for the balance loss of the global batch.

    Examples:
        >>> import monge
        >>> layer = monge.MoE(8, 16, 4, 2, router="ssr")
        >>> monge.routing.use_group(layer, None)  # this process alone, as at the start
    """
    ranks = RowGroup(group)
    for router in routers_of(model):
        router.share(ranks)


def step(model: nn.Module, *, group: dist.ProcessGroup | None = None) -> None:
    """Advance every router of ``model``: call it once after every ``optimizer.step()``.

    Sums what the forwards since the last call collected (E + 1 float64 a router, one all-reduce for all of
    them), updates prices, biases and counters, clears the accumulators and decides each layer's next SSR
    branch. Micro-batches and ranks count by their number of valid tokens; one without any contributes
    nothing. Routers without state are left alone.

    Args:
        model: any module with routers inside, wrapped (DDP, FSDP, ``torch.compile``) or not.
        group: the data-parallel process group; None is that of `monge.routing.use_group`, else the default
            group where ``torch.distributed`` is initialised. All its ranks must call ``step`` together.

    Raises:
        ValueError: ``model`` has no router.

    Examples:
        >>> import torch, monge
        >>> layer = monge.MoE(8, 16, 4, 2, router="prices")
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> (layer(torch.randn(5, 8)).square().mean() + monge.aux_loss(layer)).backward()
        >>> optimizer.step(); optimizer.zero_grad(); monge.step(layer)
        >>> int(layer.router.steps)
        1
    """
    routers = [router for router in routers_of(model) if isinstance(router, SteppedRouter)]
    if not routers:
        return
    device = routers[0].collected.device
    flat = torch.cat([router.collected.to(device) for router in routers])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat, group=routers[0].ranks.group if group is None else group)
    sizes = [len(router.collected) for router in routers]
    for router, total in zip(routers, flat.split(sizes), strict=True):
        router.advance(total.to(router.collected.device))


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of the last forward, coefficients included; add it to the loss.

    A zero on the model's device where no router has one. Under reentrant activation checkpointing the forward
    records no gradient, so these losses would teach nothing: a warning says so; use ``use_reentrant=False``.

    Raises:
        ValueError: ``model`` has no router.

    Examples:
        >>> import torch, monge
        >>> layer = monge.MoE(8, 16, 4, 2, router="switch")
        >>> _ = layer(torch.randn(5, 8))
        >>> monge.aux_loss(layer).requires_grad
        True
    """
    routers = routers_of(model)
    device = routers[0].weight.device
    total = torch.zeros((), device=device)
    for router in routers:
        if router.last_aux_loss is None:
            continue
        if torch.is_grad_enabled() and router.weight.requires_grad and not router.last_aux_loss.requires_grad:
            warnings.warn(
                f"the auxiliary loss of layer {router.layer} carries no gradient: its forward ran without "
                "gradients, as under reentrant activation checkpointing. Checkpoint with use_reentrant=False",
                RuntimeWarning,
                stacklevel=2,
            )
        total = total + router.last_aux_loss.to(device)
    return total


@contextmanager
def training_routes(model: nn.Module) -> Iterator[None]:
    """Measure training-mode routing: inside, every router routes as its method does in training, whatever its
    mode.

    SSR takes its transport branch, MaxScore solves its assignment, expert choice looks at the batch; nothing
    is collected and no auxiliary loss appears unless the module is in training mode.

    Raises:
        ValueError: ``model`` has no router.

    Examples:
        >>> import torch
        >>> from monge.routing import make_router, training_routes
        >>> router = make_router("expert_choice", dim=8, num_experts=4, top_k=2).eval()
        >>> with training_routes(router):
        ...     router(torch.randn(6, 8)).loads.tolist()
        [3, 3, 3, 3]
    """
    routers = routers_of(model)
    before = [router.route_as_in_training for router in routers]
    for router in routers:
        router.route_as_in_training = True
    try:
        yield
    finally:
        for router, value in zip(routers, before, strict=True):
            router.route_as_in_training = value


def routers_of(model: nn.Module) -> list[Router]:
    """The routers inside ``model``, at least one."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router of monge: build its layers with monge.MoE")
    return routers
