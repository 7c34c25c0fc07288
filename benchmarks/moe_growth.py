"""How the experts' cost grows along one axis at a time: `python -m benchmarks.moe_growth`.

From a base case, the tokens, the experts, the experts per token and the width of an expert are doubled again
and again; everything else stays. Prints for each axis, forward and forward + backward, the exponent fitted to
log time over log size, and the largest exponent between two neighbours: a cliff would stand out there. Cases
whose weights, gradients and activations would exceed the memory cap are left out.

Shapes: T tokens, K experts per token, E experts, H model width, I expert width.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise

import numpy as np
import torch

from benchmarks.figures import machine, write_json
from monge.moe import Experts
from monge.speed.timing import interleave

BASE = {"T": 512, "E": 16, "K": 2, "I": 256}
AXES = {
    "T": (1, 4, 16, 64, 256, 1024, 4096),
    "E": (2, 4, 8, 16, 32, 64, 128),
    "K": (1, 2, 4, 8, 16),
    "I": (32, 64, 128, 256, 512, 1024, 2048),
}
H = 512


def bytes_of(T: int, E: int, K: int, I: int) -> int:
    """Weights and their gradients, pre-activations, and inputs and outputs with theirs, in float32."""
    return 4 * (2 * 3 * E * H * I + 2 * T * K * 2 * I + 4 * T * H)


def step(T: int, E: int, K: int, I: int, *, backward: bool):  # type: ignore[no-untyped-def]
    """A forward, or a forward and backward, as a callable without arguments."""
    torch.manual_seed(0)
    experts = Experts(H, I, E)
    x_TH, grad_TH = torch.randn(T, H, requires_grad=backward), torch.randn(T, H)
    gates_TK, indices_TK = torch.randn(T, E).softmax(dim=1).topk(K, dim=1)

    def run() -> object:
        with torch.set_grad_enabled(backward):
            out_TH = experts(x_TH, indices_TK, gates_TK)
        return torch.autograd.grad(out_TH, [x_TH, *experts.parameters()], grad_TH) if backward else out_TH

    return run


def exponents(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """The slope of log time over log size by least squares, and the largest between two neighbours."""
    x, y = np.log(sizes), np.log(seconds)
    return float(np.polyfit(x, y, 1)[0]), max(
        (b - a) / (v - u) for (a, b), (u, v) in zip(pairwise(y), pairwise(x))
    )


def plot(rows: list[dict], path: str) -> None:
    """One panel an axis, time over size, both logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'monge[plot]'") from error
    figure = Figure(figsize=(3 * len(AXES), 3), layout="constrained")
    for axis, ax in zip(AXES, figure.subplots(1, len(AXES))):
        for row in (r for r in rows if r["axis"] == axis):
            times = row["ms"]
            ax.loglog([int(s) for s in times], list(times.values()), marker="o", label=row["mode"])
        ax.set_xlabel(axis)
        ax.set_ylabel("ms")
        ax.set_ylim(top=4 * ax.get_ylim()[1])  # room for the legend
        ax.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=2.0, help="cap in GiB (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a busy machine")
    parser.add_argument("--plot", help="also draw the curves to this file (png, svg, pdf)")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    print(machine(), f"base {BASE}, H {H}")
    rows: list[dict] = []
    for axis, sizes in AXES.items():
        for backward in (False, True):
            cases = {size: BASE | {axis: size} for size in sizes}
            kept = [size for size, case in cases.items() if bytes_of(**case) <= args.memory * 2**30]
            runs = {str(size): step(**cases[size], backward=backward) for size in kept}
            seconds = interleave(runs, repeats=args.repeats, warmup=0.0, clock=clock)
            fitted, steepest = exponents(kept, list(seconds.values()))
            # a fit over the upper half: below it fixed costs and the reading of weights dominate
            half = len(kept) // 2
            upper, _ = exponents(kept[half:], list(seconds.values())[half:])
            mode = "forward+backward" if backward else "forward"
            ms = {size: 1000 * s for size, s in seconds.items()}
            found = {"exponent": fitted, "exponent_upper": upper, "steepest": float(steepest)}
            rows.append({"axis": axis, "mode": mode, **found, "ms": ms})
            shown = "  ".join(f"{size}:{t:.3g}" for size, t in ms.items())
            print(
                f"{axis:2} {mode:17} exponent {fitted:5.2f}, upper half {upper:5.2f}, "
                f"steepest {steepest:5.2f} | ms {shown}",
                flush=True,
            )
            assert all(math.isfinite(v) for v in found.values())
    if args.plot:
        plot(rows, args.plot)
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
