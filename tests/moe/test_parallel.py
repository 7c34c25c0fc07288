"""Expert parallelism on four gloo processes equals the layer on one: outputs, gradients, checkpoints.

Shapes: T tokens of a rank, H model width.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import monge
from monge.moe import MoE
from monge.moe.parallel import clip_gradients, expert_parameters, held_by, shard_experts

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
RANKS, H, STEPS = 4, 6, 2
# Experts, tokens of each rank, further arguments of the layer.
CASES = {
    "even": (8, (5, 5, 5, 5), {}),
    "experts not divisible": (5, (7, 3, 4, 6), {"shared_hidden": 3}),
    "fewer experts than ranks": (3, (4, 4, 4, 4), {"bias": True}),
    "ranks without tokens": (8, (9, 0, 0, 2), {"activation": "gelu", "compute": "loop"}),
    "nobody has tokens": (4, (0, 0, 0, 0), {}),
    "capacity": (8, (6, 6, 6, 6), {"capacity_factor": 1.0, "compute": "grouped_mm"}),
    "expert choice": (4, (6, 6, 6, 6), {"router": "expert_choice"}),
}


def layer_of(name: str) -> tuple[MoE, list[Tensor], list[Tensor]]:
    """The whole layer, every rank's tokens and their masks."""
    E, tokens, more = CASES[name]
    torch.manual_seed(3)
    layer = MoE(H, 8, E, 2, **{"router": "topk", **more}, dtype=torch.float64)
    for weight in layer.parameters():
        nn.init.normal_(weight)
    with torch.no_grad():
        layer.router.weight[0] += 0.5  # uneven loads
    return layer, [torch.randn(T, H).double() for T in tokens], [torch.rand(T) > 0.2 for T in tokens]


def one_step(layer: nn.Module, x_TH: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    x_TH = x_TH.clone().requires_grad_()
    out_TH = layer(x_TH, mask_T)
    out_TH.square().sum().backward()
    return out_TH.detach(), x_TH.grad


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def work(folder: str) -> dict:
    """All that needs four processes; starting them takes longer than what they do."""
    return {
        "exchange": exchange_work(),
        "train": train_work(folder),
        "mixed": mixed_work(),
        "errors": errors_work(),
    }


def exchange_work() -> dict:
    rank, found = dist.get_rank(), {}
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in CASES:
        layer, xs, masks = layer_of(name)
        shard_experts(layer, mesh)
        with monge.watch(layer) as watched:
            out, grad_x = one_step(layer, xs[rank], masks[rank])
        for weight in layer.parameters():
            if not isinstance(weight, DTensor):
                dist.all_reduce(weight.grad)
                weight.grad /= RANKS
        norm = clip_gradients(layer.parameters(), 1.0)
        grads = {n: whole(w.grad) for n, w in layer.named_parameters()}
        held = layer.experts.down_proj.to_local().shape[0]
        tokens = watched.metrics()["total"]["tokens"]
        found[name] = out, grad_x, grads, held, tokens, norm
    return found


@pytest.fixture(scope="module")
def worked(tmp_path_factory) -> tuple[list[dict], Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return on_ranks(RANKS, work, str(folder)), folder


@pytest.mark.parametrize("name", CASES)
def test_equals_the_layer_on_one_process(name, worked):
    exchanged = [found["exchange"] for found in worked[0]]
    E = CASES[name][0]
    layer, xs, masks = layer_of(name)
    layer_loads = []
    # Routes and capacities are each rank's own: one forward per rank, on the same weights.
    for rank in range(RANKS):
        out, grad_x = one_step(layer, xs[rank], masks[rank])
        torch.testing.assert_close(exchanged[rank][name][0], out, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(exchanged[rank][name][1], grad_x, rtol=1e-11, atol=1e-12)
        assert exchanged[rank][name][3] == held_by(E, RANKS)[rank]
        assert exchanged[rank][name][4] == int(masks[rank].sum())
        layer_loads.append(layer.router(xs[rank], masks[rank]).loads)
    norm = torch.stack([(w.grad / RANKS).norm() for w in layer.parameters()]).norm()
    for rank in range(RANKS):
        torch.testing.assert_close(exchanged[rank][name][5], norm, rtol=1e-10, atol=1e-12)
        for weight_name, weight in layer.named_parameters():
            torch.testing.assert_close(
                exchanged[rank][name][2][weight_name],
                weight.grad / RANKS * min(1.0, 1.0 / float(norm)) if norm else weight.grad,
                rtol=1e-10,
                atol=1e-12,
                msg=lambda m, n=weight_name: f"{n}: {m}",
            )
    if name == "even":
        assert len(set(sum(layer_loads).tolist())) > 1, "the case must hold uneven loads"


class Model(nn.Module):
    """Two MoE layers among others."""

    def __init__(self, router: str, experts: int = 8) -> None:
        super().__init__()
        torch.manual_seed(5)
        options = {"ssr": {"p": 1.0}}.get(router, {})
        self.blocks = nn.ModuleList(
            MoE(H, 8, experts, 2, router=router, router_options={"layer": i, **options}) for i in range(2)
        )
        self.head = nn.Linear(H, H)
        for block in self.blocks:
            nn.init.normal_(block.router.weight, std=0.5)
            for weight in block.experts.parameters():
                nn.init.normal_(weight, std=0.4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batch_of(step: int, rank: int) -> Tensor:
    return torch.randn(9, H, generator=torch.Generator().manual_seed(100 * step + rank)).double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    experts = [w for w in model.parameters() if w in expert_parameters(model)]
    others = [w for w in model.parameters() if w not in expert_parameters(model)]
    return torch.optim.AdamW([{"params": experts}, {"params": others}], lr=0.02, eps=1e-3)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, xs: list[Tensor]) -> None:
    """One optimizer step from the mean over ranks of their losses: ``xs`` are those of this process."""
    ranks = RANKS if len(xs) > 1 else 1
    for x in xs:
        loss = model(x).square().mean() + monge.aux_loss(model)
        (loss / ranks).backward()
    clip_gradients(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    monge.step(model)


WRAPPERS = ["ddp", "fsdp", "ddp 2 x 2", "fsdp 2 x 2"]
ROUTERS = ["prices", "switch", "ssr"]


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if "2 x 2" in wrapper:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard_experts(model, mesh)
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model)
    return fully_shard(model, ignored_params=expert_parameters(model))


def train_work(folder: str) -> dict:
    warnings.simplefilter("error", RuntimeWarning)  # nothing may say that monge.step was forgotten
    found = {}
    for router in ROUTERS:
        for wrapper in WRAPPERS:
            model = Model(router)
            parallel = wrapped(model, wrapper)
            optimizer = optimizer_of(model)
            for step in range(STEPS):
                step_of(parallel, optimizer, [batch_of(step, dist.get_rank())])
            found[router, wrapper] = {n: whole(v) for n, v in model.state_dict().items()}
    weights, moments = get_state_dict(model, optimizer)  # of the last: ssr, fsdp 2 x 2
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    return found


def resume_all(folder: str) -> list[tuple[str, str, str, Tensor]]:
    return [
        (wrapper, moment, name, value)
        for wrapper in ("ddp", "fsdp")
        for moment, state in resume_work(folder, wrapper).items()
        for name, value in state.items()
    ]


def resume_work(folder: str, wrapper: str) -> dict:
    model = Model("ssr")
    for weight in model.parameters():
        nn.init.zeros_(weight)
    parallel = wrapped(model, wrapper)
    optimizer = optimizer_of(model)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    loaded = {n: whole(v).clone() for n, v in model.state_dict().items()}
    rank = dist.get_rank()
    for part in (0, 1):  # four batches on two ranks, in two micro-batches
        x = batch_of(STEPS, 2 * rank + part)
        (parallel(x).square().mean() / 2).backward()
    clip_gradients(model.parameters(), 0.5)
    optimizer.step()
    monge.step(model)
    return {"loaded": loaded, "stepped": {n: whole(v) for n, v in model.state_dict().items()}}


def reference(router: str, steps: int = STEPS) -> dict[str, Tensor]:
    model = Model(router)
    optimizer = optimizer_of(model)
    for step in range(steps):
        step_of(model, optimizer, [batch_of(step, rank) for rank in range(RANKS)])
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_training_equals_one_process(router, wrapper, worked):
    expected = reference(router)
    for found in worked[0]:
        for name, value in expected.items():
            torch.testing.assert_close(
                found["train"][router, wrapper][name],
                value,
                rtol=0,
                atol=1e-9,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_a_checkpoint_of_four_ranks_goes_on_with_two(worked):
    expected = {"loaded": reference("ssr"), "stepped": reference("ssr", STEPS + 1)}
    for found in on_ranks(2, resume_all, str(worked[1])):
        for wrapper, moment, name, value in found:
            torch.testing.assert_close(
                value,
                expected[moment][name],
                rtol=0,
                atol=1e-9,
                msg=lambda m, at=(wrapper, moment, name): f"{at}: {m}",
            )


def mixed_work() -> tuple[set, Tensor, Tensor]:
    """Two steps in bfloat16 on a 2 x 2 mesh: dtypes of the gradients, the experts, and the gates."""
    model = Model("prices").float()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    inner = MixedPrecisionPolicy(**policy, cast_forward_inputs=False)
    shard_experts(model, mesh, mp_policy=inner)
    parallel = fully_shard(
        model, ignored_params=expert_parameters(model), mp_policy=MixedPrecisionPolicy(**policy)
    )
    optimizer = optimizer_of(model)
    with monge.watch(model) as watched:
        for step in range(2):
            loss = parallel(batch_of(step, dist.get_rank()).float()).float().square().mean()
            loss.backward()
            dtypes = {weight.grad.dtype for weight in model.parameters()}
            optimizer.step()
            optimizer.zero_grad()
            monge.step(model)
    gates = next(iter(watched.routings.values())).weights
    return dtypes, whole(model.blocks[0].experts.down_proj.detach()), gates


def test_mixed_precision_on_replicas(worked):
    (dtypes, weight, gates), *others = (found["mixed"] for found in worked[0])
    assert dtypes == {torch.float32}
    assert gates.dtype == torch.float32
    assert torch.isfinite(weight).all()
    assert (weight - Model("prices").blocks[0].experts.down_proj).abs().max() > 1e-3
    assert all(torch.equal(weight, other[1]) for other in others)


def errors_work() -> list[str]:
    mesh = init_device_mesh("cpu", (RANKS,))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    sharded = MoE(H, 8, 4, 2)
    shard_experts(sharded, mesh)
    said = []
    for model, given, more in (
        (nn.Linear(2, 2), mesh, {}),
        (sharded, mesh, {}),
        (MoE(H, 8, 4, 2), init_device_mesh("cpu", (2, 2)), {}),
        (MoE(H, 8, 4, 2), mesh, {"reshard_after_forward": False}),
        (MoE(7, 8, 4, 2), two, {}),
    ):
        try:
            shard_experts(model, given, **more)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_errors_name_the_remedy(worked):
    words = ("monge.MoE", "sharded already", "with names", "reshard_after_forward", "7 rows of down_proj")
    for found in worked[0]:
        for word, message in zip(words, found["errors"], strict=True):
            assert word in message
