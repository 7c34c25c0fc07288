"""The experts beside the dense FFN they are cut from and beside transformers: python -m benchmarks.moe_dense.

Table 1, inference: a SwiGLU FFN of width F = 8192 at d 2048, cut into 64 experts of 128 neurons of which 16
or 32 are active: times faster than the dense FFN at a decode step, 32 tokens and a prefill of 512. Every call
takes the next of eight batches with routings of their own, as the tokens of a text would.

Table 2, training: forward and backward of the experts of two layers at 2,048 tokens; the achieved FLOP/s as a
share of those of a dense FFN of the same active width, the peak memory of a step, and transformers beside it.

Shapes: T tokens, K experts per token, E experts, H model width, I expert width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.moe_paths import DTYPES, transformers_experts
from benchmarks.timing import interleave, machine, peak_bytes, write_json
from monge.moe import Experts
from monge.moe.compute import choose_path

THEIRS = ("eager", "batched_mm", "grouped_mm")
BATCHES = 8  # routings that a case goes through
INFERENCE = (2048, 128, 64)  # H, I, E
ACTIVE = (0.25, 0.5)
PHASES = {"decode": 1, "32 tokens": 32, "prefill 512": 512}
TRAINING = {"MoE(512, 1024, 16, 2)": (512, 1024, 16, 2), "MoE(1024, 2048, 64, 4)": (1024, 2048, 64, 4)}
BATCHED_LIMIT = 2**28  # bytes of weights that batched_mm copies: beyond, it is left out (32 tokens: 0.05)


class Dense(nn.Module):
    """The SwiGLU feed-forward network of width F."""

    def __init__(self, H: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(H, width, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(width, H, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def routed(T: int, H: int, E: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a random routing with renormalised gates."""
    gates_TK, indices_TK = torch.randn(T, E).softmax(dim=1).topk(K, dim=1)
    return torch.randn(T, H).to(dtype), indices_TK, gates_TK / gates_TK.sum(dim=1, keepdim=True)


def candidates(
    H: int, I: int, E: int, K: int, T: int, dtype: torch.dtype, dense_width: int, *, backward: bool
) -> dict[str, Callable[[], object]]:
    """The dense FFN, ours and transformers', as callables without arguments; weights are shared."""
    torch.manual_seed(0)
    batches = [routed(T, H, E, K, dtype) for _ in range(BATCHES)]
    experts, dense = Experts(H, I, E, dtype=dtype), Dense(H, dense_width, dtype)
    modules: dict[str, nn.Module] = {"monge": experts}
    for name in THEIRS:
        copied = T * K * 3 * H * I * dtype.itemsize
        if name != "batched_mm" or copied <= BATCHED_LIMIT:
            modules[f"transformers {name}"] = transformers_experts(experts, name)
    grad_TH = torch.randn(T, H).to(dtype)

    def call(function: Callable[[Tensor, Tensor, Tensor], Tensor], parameters: list[Tensor]) -> Callable:
        turns = cycle(batches)

        def run() -> object:
            x_TH, indices_TK, weights_TK = next(turns)
            if not backward:
                with torch.no_grad():
                    return function(x_TH, indices_TK, weights_TK)
            x_TH = x_TH.detach().requires_grad_()
            return torch.autograd.grad(function(x_TH, indices_TK, weights_TK), [x_TH, *parameters], grad_TH)

        return run

    runs = {"dense": call(lambda x, indices, weights: dense(x), list(dense.parameters()))}
    for name, module in modules.items():
        gates = (lambda w: w) if name == "monge" else (lambda w: w.to(dtype))
        runs[name] = call(
            lambda x, indices, weights, module=module, gates=gates: module(x, indices, gates(weights)),  # type: ignore[misc]
            list(module.parameters()),
        )
    return runs


def inference(
    phases: list[str], dtypes: list[str], repeats: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    """Table 1: times faster than dense."""
    H, I, E = INFERENCE
    rows: list[dict[str, object]] = []
    for dtype in dtypes:
        for active in ACTIVE:
            K = round(active * E)
            for phase in phases:
                T = PHASES[phase]
                runs = candidates(H, I, E, K, T, DTYPES[dtype], E * I, backward=False)
                seconds = interleave(runs, repeats=repeats, clock=clock)
                times = {name: seconds["dense"] / s for name, s in seconds.items()}
                best = max(v for name, v in times.items() if name.startswith("transformers"))
                flops = 6 * T * K * H * I / seconds["monge"] / (6 * T * E * I * H / seconds["dense"])
                path = choose_path(T * K, E, DTYPES[dtype], torch.device("cpu"))
                row = {
                    "dtype": dtype,
                    "active": f"{active:.0%}",
                    "phase": phase,
                    "path": path,
                    "times_dense": times,
                }
                rows.append(row | {"over_transformers": times["monge"] / best, "flops_of_dense": flops})
                others = "  ".join(f"{n.removeprefix('transformers ')} {v:.2f}" for n, v in times.items())
                print(
                    f"{dtype:9} {active:4.0%} {phase:12} {path:10} {times['monge']:6.2f}x dense, "
                    f"{times['monge'] / best:5.2f}x transformers, {flops:5.2f} of dense FLOP/s | {others}",
                    flush=True,
                )
    return rows


def training(
    layers: list[str], dtypes: list[str], repeats: int, clock: Callable[[], float], T: int = 2048
) -> list[dict[str, object]]:
    """Table 2: the step's FLOP/s over those of the dense FFN of equal active width, and peak memory."""
    rows: list[dict[str, object]] = []
    for dtype in dtypes:
        for name in layers:
            H, I, E, K = TRAINING[name]
            runs = candidates(H, I, E, K, T, DTYPES[dtype], K * I, backward=True)
            seconds = interleave(runs, repeats=repeats, warmup=0.0, clock=clock)
            share = {who: seconds["dense"] / s for who, s in seconds.items()}
            peak = {who: peak_bytes(run) for who, run in runs.items()}
            rows.append({"layer": name, "dtype": dtype, "flops_of_dense": share, "peak_bytes": peak})
            shown = "  ".join(f"{n} {v:.2f} ({peak[n] / 2**20:.0f} MiB)" for n, v in share.items())
            print(f"{dtype:9} {name:24} {1000 * seconds['monge']:8.1f} ms | {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["inference", "training"], help="one table instead of both")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--layers", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds per case (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread: for a machine that others use too"
    )
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(machine())
    rows: list[dict[str, object]] = []
    if args.only in (None, "inference"):
        rows += inference(args.phases, args.dtypes, args.repeats, clock)
    if args.only in (None, "training"):
        rows += training(args.layers, args.dtypes, args.repeats, clock)
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
