"""The compute paths of monge.MoE side by side, and beside transformers: `python -m benchmarks.moe_paths`.

Forward alone (inference) and forward + backward of the experts, given the same routing: uniform random
experts with renormalised gates. The fixed table of `monge.moe.compute.choose_path` was read from these
figures.

Shapes: T tokens, K experts per token, E experts, H model width, I expert width.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch

from benchmarks.figures import write_json
from monge.moe import Experts
from monge.moe.compute import PATHS, choose_path
from monge.speed.candidates import routed, transformers_experts
from monge.speed.timing import clock_of, interleave

TOKENS = (1, 8, 32, 512, 2048)
SIZES = {  # name -> H, I, E, K
    "512x1024, 2 of 16": (512, 1024, 16, 2),
    "1024x256, 8 of 64": (1024, 256, 64, 8),
    "2048x128, 16 of 64": (2048, 128, 64, 16),
    "2048x128, 32 of 64": (2048, 128, 64, 32),
    "576x48, 8 of 24": (576, 48, 24, 8),
    "576x96, 4 of 12": (576, 96, 12, 4),
    "512x256, 2 of 16": (512, 256, 16, 2),
    "2048x256, 8 of 32": (2048, 256, 32, 8),
    "512x512, 2 of 16": (512, 512, 16, 2),
    "1024x2048, 2 of 16": (1024, 2048, 16, 2),
}
USUAL = list(SIZES)[:3]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def candidates(
    T: int,
    H: int,
    I: int,
    E: int,
    K: int,
    dtype: torch.dtype,
    device: str,
    *,
    backward: bool,
    transformers: bool,
) -> dict[str, Callable[[], object]]:
    """Every path, and transformers' two, as callables without arguments."""
    torch.manual_seed(0)
    experts = Experts(H, I, E, dtype=dtype).to(device)
    x_TH, indices_TK, weights_TK = routed(T, H, E, K, dtype, device)
    x_TH.requires_grad_(backward)
    weights_TK.requires_grad_(backward)
    grad_TH = torch.randn(T, H).to(device, dtype)
    modules: dict[str, torch.nn.Module] = {}
    for name in PATHS:
        modules[name] = copy.copy(experts)
        modules[name].compute = name  # type: ignore[assignment]
    if transformers:
        modules |= {
            f"transformers {name}": transformers_experts(experts, name) for name in ("eager", "grouped_mm")
        }

    def run(module: torch.nn.Module) -> object:
        with torch.set_grad_enabled(backward):
            weights = weights_TK if isinstance(module, Experts) else weights_TK.to(dtype)
            out_TH = module(x_TH, indices_TK, weights)
            return (
                torch.autograd.grad(out_TH, [x_TH, weights_TK, *module.parameters()], grad_TH)
                if backward
                else None
            )

    return {name: lambda module=module: run(module) for name, module in modules.items()}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="", help="also write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds per case")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--sizes", nargs="+", default=USUAL, choices=list(SIZES))
    parser.add_argument("--forward-only", action="store_true", help="inference alone")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a busy machine")
    parser.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else clock_of(args.device)
    if args.cpu_time:
        torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for dtype in args.dtypes:
        for size in args.sizes:
            H, I, E, K = SIZES[size]
            for T in args.tokens:
                for backward in (False,) if args.forward_only else (False, True):
                    runs = candidates(
                        T,
                        H,
                        I,
                        E,
                        K,
                        DTYPES[dtype],
                        args.device,
                        backward=backward,
                        transformers=not args.no_transformers,
                    )
                    repeats = args.repeats * (1 if T > 16 else 5)
                    ms = {
                        name: 1000 * s for name, s in interleave(runs, repeats=repeats, clock=clock).items()
                    }
                    auto = choose_path((T, K), (E, H, I), DTYPES[dtype], torch.device(args.device))
                    mode = "forward+backward" if backward else "forward"
                    rows.append({"size": size, "T": T, "dtype": dtype, "mode": mode, "auto": auto, "ms": ms})
                    relative = "  ".join(f"{name} {t / ms[auto]:.2f}" for name, t in ms.items())
                    print(
                        f"{dtype:8} {size:19} T={T:<5} {mode:16} {ms[auto]:9.3f} ms | {relative}", flush=True
                    )
    if args.out:
        write_json(args.out, rows, args.device)


if __name__ == "__main__":
    main()
