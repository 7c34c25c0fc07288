"""Bytes and messages of every router in one training step, counted on gloo processes of this machine.

    python -m benchmarks.messages --out runs/bench/messages.json

One MoE layer, T tokens per process in one micro-batch, `monge.routing.use_group` over all processes, then
without it. What a process hands to a collective is counted at the functions of torch.distributed:
the size of its tensor for a reduction, its own part for a gather, the rows it sends for an exchange. What the
network carries per process depends on the algorithm; docs/scale.md has the formulas. Gradients are not
counted (there is no DDP here). The last column is a model, not a measurement: forward and backward of the
layer over --model-ranks ranks, all messages taken as reductions.

Shapes: T tokens of a process, E experts, H model width.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import monge
from benchmarks.figures import write_json
from monge.moe.parallel import shard_experts
from monge.routing import use_group

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "switch, batch": ("switch", {}),
    "switch, global": ("switch", {"scope": "global"}),
    "noisy_topk": ("noisy_topk", {}),
    "lossfree": ("lossfree", {}),
    "quantile": ("quantile", {}),
    "prices": ("prices", {}),
    "sbase": ("sbase", {}),
    "ssr, transport step": ("ssr", {"p": 1.0}),
    "ssr, other step": ("ssr", {"p": 0.0}),
    "maxscore, exact": ("maxscore", {}),
    "maxscore, approximate": ("maxscore", {"method": "approximate"}),
    "topk, experts on all processes": ("topk", {}),
}
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single", "broadcast", "reduce_scatter_tensor")
PHASES = ("forward", "backward", "step")


@contextmanager
def counted(into: list[int]) -> Iterator[None]:
    """Append the bytes of every collective that this process takes part in."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def collective(first: Any, *rest: Any, **options: Any) -> Any:
            sent: Tensor = (
                rest[0] if name in ("all_gather", "all_to_all_single", "reduce_scatter_tensor") else first
            )
            into.append(sent.numel() * sent.element_size())
            return originals[name](first, *rest, **options)

        return collective

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def one_case(case: str, group: Any, args: argparse.Namespace) -> dict[str, Any]:
    router, options = CASES[case]
    torch.manual_seed(dist.get_rank())
    x_TH = torch.randn(args.tokens, args.dim, requires_grad=True)
    torch.manual_seed(0)
    layer = monge.MoE(args.dim, args.dim, args.experts, args.top_k, router=router, router_options=options)
    torch.nn.init.normal_(layer.router.weight, std=args.dim**-0.5)
    if "experts on all" in case:
        shard_experts(layer, dist.device_mesh.init_device_mesh("cpu", (args.processes,)))
    use_group(layer, group)
    sizes: dict[str, list[int]] = {phase: [] for phase in PHASES}
    with counted(sizes["forward"]):
        loss = layer(x_TH).square().mean() + monge.aux_loss(layer)
    with counted(sizes["backward"]):
        loss.backward()
    with counted(sizes["step"]):
        monge.step(layer)
    return {
        phase: {"messages": len(s), "bytes": sum(s), "largest": max(s, default=0)}
        for phase, s in sizes.items()
    }


def work(rank: int, port_file: str, args: argparse.Namespace, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=args.processes)
    settings = {name: getattr(args, name) for name in ("processes", "tokens", "experts", "top_k", "dim")}
    rows: list[dict[str, object]] = []
    for case in CASES:
        for group in (dist.group.WORLD,) if "experts on all" in case else (dist.group.WORLD, None):
            figures = one_case(case, group, args)
            rows.append({**settings, "case": case, "group": group is not None, **figures})
    if rank == 0:
        write_json(results, rows)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="", help="also keep the figures in this JSON file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="per process")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--model-ranks", type=int, default=4096, help="of the modelled latency")
    parser.add_argument("--model-latency", type=float, default=10.0, help="microseconds per hop")
    parser.add_argument("--model-bandwidth", type=float, default=25.0, help="GB/s per rank")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = args.out or os.path.join(folder, "messages.json")
        torch.multiprocessing.spawn(work, args=(f"{folder}/meeting", args, results), nprocs=args.processes)
        print_table(json.loads(Path(results).read_text())["rows"], args)


def modelled_ms(messages: int, sent: int, args: argparse.Namespace) -> float:
    """A model of reductions over N ranks, in milliseconds: ``2 log2(N) latency + 2 bytes / bandwidth``."""
    hops = 2 * math.log2(args.model_ranks)
    return 1e3 * (messages * hops * args.model_latency * 1e-6 + 2 * sent / (args.model_bandwidth * 1e9))


def print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(
        f"{'messages, bytes of a process in':34}"
        + "".join(f"{phase:>22}" for phase in PHASES)
        + "   model, ms"
    )
    for row in rows:
        name = row["case"] + ("" if row["group"] else " (without group)")
        cells = "".join(f"{row[phase]['messages']:>8} {row[phase]['bytes']:>13,}" for phase in PHASES)
        messages, sent = (sum(row[phase][of] for phase in PHASES[:2]) for of in ("messages", "bytes"))
        print(f"{name:34}{cells}{modelled_ms(messages, sent, args):>12.2f}")


if __name__ == "__main__":
    main()
