"""Expert parallelism: every rank holds some of the experts, and tokens travel to them.

`shard_experts` turns the stacked weights of every `MoE` layer's experts into DTensors; DDP or FSDP2
(``fully_shard``) goes on top for all other weights, and torch.distributed.checkpoint saves and re-shards the
whole. Routers stay as they are, one copy per rank: `monge.step`, `monge.watch` and `monge.routing.use_group`
work as without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from monge.moe.exchange import Exchange
from monge.moe.experts import Experts


def shard_experts(model: nn.Module, mesh: DeviceMesh, **replicas: Any) -> None:
    """Spread the experts of every layer of ``model`` over the last dimension of ``mesh``, in place.

    Rank i of n holds the experts that ``torch.chunk(experts, n)[i]`` would: where n does not divide their
    number, the last ranks hold fewer, or none. Every rank keeps its own tokens and routes them; a forward
    sends each chosen token to its experts and back (two all-to-all exchanges of rows, two more in the
    backward, and one of E counts). Output and gradients are those of the layer on one process; gradients of
    experts are those of the mean of all ranks' losses, as DDP and FSDP make those of the other weights. Every
    rank must call every forward and backward, one without tokens too.

    On a mesh of two dimensions, say ``("replicas", "experts")``, the first holds copies of the experts, which
    share their gradients: each layer's experts become an FSDP unit over it.

    What follows is the wrapping of all other weights: ``DistributedDataParallel(model)``, which leaves the
    experts alone, if ``model`` is what it wraps; or ``fully_shard(model,
    ignored_params=expert_parameters(model))``. Optimizers want experts and other weights in separate
    parameter groups, because one group cannot mix DTensors of different meshes.

    Args:
        model: any module with `MoE` layers inside; on all ranks the same.
        mesh: from ``torch.distributed.init_device_mesh``, of one dimension, or of two with names.
        replicas: further arguments of ``fully_shard`` (``mp_policy``, ``reshard_after_forward``), for a mesh
            of two dimensions. A ``mp_policy`` wants ``cast_forward_inputs=False``, or it rounds the gates.

    Raises:
        ValueError: ``model`` has no experts or they are sharded already, or the mesh does not fit.

    Source: arXiv 2006.16668 (expert parallelism).

    Example (under ``torchrun``):
        ::

            mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicas", "experts"))
            shard_experts(model, mesh)
            fully_shard(model, ignored_params=expert_parameters(model))
    """
    units = [module for module in model.modules() if isinstance(module, Experts)]
    if not units:
        raise ValueError(f"{type(model).__name__} has no experts to shard: build its layers with monge.MoE")
    if any(unit.exchange is not None for unit in units):
        raise ValueError("the experts of this model are sharded already: call shard_experts once")
    if mesh.ndim > 2 or (mesh.ndim == 2 and not mesh.mesh_dim_names):
        raise ValueError(
            f"mesh must have one dimension, or two with names, got {mesh.ndim} and names "
            f"{mesh.mesh_dim_names}: init_device_mesh(device, (2, 4), mesh_dim_names=('replicas', 'experts'))"
        )
    if mesh.ndim == 1 and replicas:
        raise ValueError(f"{', '.join(replicas)} concern replicas, and a mesh of one dimension has none")
    names = mesh.mesh_dim_names
    outer, inner = (mesh[names[0]], mesh[names[1]]) if mesh.ndim == 2 and names else (None, mesh)
    for unit in units:
        _check_widths(unit, outer)
    for unit in units:
        unit.exchange = Exchange(inner.get_group(), held_by(unit.num_experts, inner.size()))
        for name, weight in list(unit.named_parameters()):
            unit.register_parameter(name, _sharded(weight, inner, unit.exchange.held))
        if outer is not None:
            fully_shard(unit, mesh=outer, shard_placement_fn=_second_dimension, **replicas)
    own = expert_parameters(model)
    ours = {name for name, weight in model.named_parameters() if weight in own}
    ignored = {*ours, *getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The weights of all experts inside ``model``, which `shard_experts` spreads or has spread."""
    units = (module for module in model.modules() if isinstance(module, Experts))
    return {weight for unit in units for weight in unit.parameters()}


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for weights of which some are sharded, over whatever mesh.

    Sums the squares of this rank's parts and, for every mesh, sends one number per dimension along which
    gradients are sharded. Gradients longer than ``max_norm`` in total are scaled down to it.

    Args:
        parameters: of the model, each once; those without a gradient are skipped. On all ranks the same.
        max_norm: the largest 2-norm.

    Returns:
        Tensor: the norm before, a scalar, equal on all ranks.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], 1.0).item(), weight.grad.norm().item()
        (5.0, 1.0)
    """
    grads = [weight.grad for weight in parameters if weight.grad is not None]
    squares: dict[tuple[DeviceMesh, tuple[int, ...]] | None, Tensor] = {}
    for grad in grads:
        key, part = None, grad
        if isinstance(grad, DTensor):
            dims = tuple(i for i, placement in enumerate(grad.placements) if not placement.is_replicate())
            key, part = (grad.device_mesh, dims), grad.to_local()
        square = part.square().sum(dtype=torch.promote_types(part.dtype, torch.float32))
        squares[key] = squares[key] + square if key in squares else square
    for key, square in squares.items():
        for dim in key[1] if key else ():
            dist.all_reduce(square, group=key[0].get_group(dim))  # type: ignore[index]
    norm = (
        torch.stack([square.double() for square in squares.values()]).sum().sqrt()
        if squares
        else torch.zeros(())
    )
    scale = (max_norm / norm).clamp(max=1.0)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.dtype))
    return norm


def held_by(num_experts: int, ranks: int) -> tuple[int, ...]:
    """How many experts each rank holds, as ``torch.chunk`` deals them.

    Examples:
        >>> held_by(8, 4), held_by(5, 4), held_by(2, 3)
        ((2, 2, 2, 2), (2, 2, 1, 0), (1, 1, 0))
    """
    most = -(-num_experts // ranks)
    return tuple(max(0, min(most, num_experts - rank * most)) for rank in range(ranks))


def _sharded(weight: nn.Parameter, mesh: DeviceMesh, held: tuple[int, ...]) -> nn.Parameter:
    """This rank's experts of the stacked ``weight``, as a DTensor; the others' memory is free to go."""
    first = sum(held[: mesh.get_local_rank()])
    part = weight.detach()[first : first + held[mesh.get_local_rank()]].clone()
    spread = DTensor.from_local(part, mesh, [Shard(0)], shape=weight.shape, stride=weight.stride())
    return nn.Parameter(spread, requires_grad=weight.requires_grad)


def _second_dimension(weight: nn.Parameter) -> Shard:
    """Replicas divide the rows of every expert: the first dimension, the experts, is divided already."""
    return Shard(1)


def _check_widths(unit: Experts, replicas: DeviceMesh | None) -> None:
    if replicas is None:
        return
    for name, weight in unit.named_parameters():
        if weight.shape[1] % replicas.size():
            raise ValueError(
                f"{replicas.size()} replicas cannot divide the {weight.shape[1]} rows of {name}: "
                "choose a width that they divide, or a mesh of one dimension"
            )
