"""monge.ot.sinkhorn over two gloo processes equals one process on all rows, gradients and decisions included.

Shapes: T rows of all ranks, E columns.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from monge.ot import sinkhorn

pytestmark = pytest.mark.xdist_group("ranks")

E = 5
RANKS = 2

# Rows of each rank, the rest of the call, and whether masses are given.
CASES = {
    "even": ((12, 12), {"epsilon": 0.7}, False),
    "uneven, with masses": ((17, 4), {"epsilon": 0.5}, True),
    "a rank without rows": ((9, 0), {"epsilon": 1.0}, True),
    "log form": ((30, 21), {"epsilon": 0.03, "max_iters": 3000}, True),
    "no rows at all": ((0, 0), {}, False),
    "capped": ((8, 8), {"epsilon": 0.1, "max_iters": 4}, False),
}


def inputs(name):
    """The whole problem, with leaves that take gradients."""
    rows, options, masses = CASES[name]
    generator = torch.Generator().manual_seed(7)
    scores, weight = torch.randn(2, sum(rows), E, generator=generator, dtype=torch.float64)
    row_mass = torch.rand(sum(rows), generator=generator, dtype=torch.float64) + 0.1
    col_mass = torch.rand(E, generator=generator, dtype=torch.float64) + 0.1
    mask = torch.rand(sum(rows), generator=generator) > 0.2
    if masses:
        options = {**options, "row_mass": row_mass, "col_mass": col_mass, "mask": mask}
    return rows, scores, weight, {"tol": 1e-12, "max_iters": 500, **options}


def solve_part(name, group=None, rank=None):
    """Plan, figures and gradients of one rank's rows, or of all rows when ``rank`` is None."""
    rows, scores, weight, options = inputs(name)
    part = slice(None) if rank is None else slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    for key in ("row_mass", "mask"):
        if key in options:
            options[key] = options[key][part].clone()
    scores = scores[part].clone()
    leaves = [x for x in (scores, options.get("row_mass"), options.get("col_mass")) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    result = sinkhorn(scores, group=group, **options)
    grads = torch.autograd.grad((result.plan * weight[part]).sum(), leaves)
    figures = (result.iterations, result.row_error, result.col_error, result.converged)
    return result.plan.detach(), result.log_u, result.log_v, figures, grads


def solve_on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {name: solve_part(name, dist.group.WORLD, rank) for name in CASES}
    messages = []
    for scores in (torch.randn(3, E), torch.full((3, E), float("nan"))):
        try:  # only rank 1 has NaN: both must raise, or the other would wait forever
            sinkhorn(scores if rank == 1 else scores.nan_to_num(0.0), group=dist.group.WORLD)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    found["messages"] = messages
    found["sizes"] = message_sizes()
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def message_sizes():
    """Numbers in every message of a forward, then of a backward."""
    sizes = []
    all_reduce = dist.all_reduce

    def note(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = note
    try:
        scores = torch.randn(40, E, requires_grad=True)
        plan = sinkhorn(scores, group=dist.group.WORLD).plan
        forward = list(sizes)
        plan.square().sum().backward()
    finally:
        dist.all_reduce = all_reduce
    return forward, sizes[len(forward) :]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(solve_on_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name):
    plan, log_u, log_v, figures, grads = solve_part(name)
    parts = [ranks[rank][name] for rank in range(RANKS)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), plan, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), log_u, atol=1e-7, rtol=0)
    torch.testing.assert_close(torch.cat([p[4][0] for p in parts]), grads[0], atol=1e-9, rtol=0)
    if len(grads) == 3:
        torch.testing.assert_close(torch.cat([p[4][1] for p in parts]), grads[1], atol=1e-9, rtol=0)
    for part in parts:
        torch.testing.assert_close(part[2], log_v, atol=1e-7, rtol=0)
        if len(grads) == 3:
            torch.testing.assert_close(part[4][2], grads[2], atol=1e-9, rtol=0)
    if name != "log form":  # where one process takes Newton's steps
        assert all(int(part[3][0]) == int(figures[0]) for part in parts)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(ranks, name):
    first, second = (ranks[rank][name] for rank in range(RANKS))
    assert torch.equal(first[2], second[2])
    assert all(torch.equal(a, b) for a, b in zip(first[3], second[3]))
    assert bool(first[3][3]) == (name != "capped")


@pytest.mark.distributed
def test_one_bad_rank_stops_all(ranks):
    for rank in range(RANKS):
        fine, bad = ranks[rank]["messages"]
        assert fine == ""
        assert "scores hold NaN" in bad


@pytest.mark.distributed
def test_forward_sends_columns_and_backward_one_matrix(ranks):
    for rank in range(RANKS):
        forward, backward = ranks[rank]["sizes"]
        assert max(forward) <= 2 * E + 2
        assert sorted(backward) == [1, E * (E + 2)]
