"""The router's share of a layer's training step: `python -m benchmarks.moe_router_share`.

Forward and backward of the router alone, and of the whole layer, in the same interleaved run; share = router
/ layer. SSR is timed with transport on every step and on none, and weighted by p = .01. Two sizes: 2,048
tokens on 16 experts, top-2, width 512 x 1024, and 8,192 tokens on 64 experts, top-4, width 1024 x 2048 (the
second needs about 5 GB).

Shapes: T tokens, H model width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

import monge
from benchmarks.figures import machine, write_json
from monge.speed.timing import interleave

CASES = {"(2048, 16, 2)": (2048, 512, 1024, 16, 2), "(8192, 64, 4)": (8192, 1024, 2048, 64, 4)}
P = 0.01
ROUTERS: dict[str, tuple[str, dict[str, object]]] = {
    "topk": ("topk", {}),
    "prices": ("prices", {}),
    "ssr without transport": ("ssr", {"p": 0.0}),
    "ssr with transport": ("ssr", {"p": 1.0}),
    "maxscore": ("maxscore", {}),
}


def router_step(router: nn.Module, x_TH: torch.Tensor) -> Callable[[], object]:
    """Route, send a gradient of ones back through the gates, and step."""

    def run() -> object:
        routing = router(x_TH)
        loss = routing.weights.sum() if routing.aux_loss is None else routing.weights.sum() + routing.aux_loss
        grads = torch.autograd.grad(loss, [x_TH, *router.parameters()], allow_unused=True)
        monge.step(router)
        return grads

    return run


def layer_step(layer: monge.MoE, x_TH: torch.Tensor, grad_TH: torch.Tensor) -> Callable[[], object]:
    """Forward, backward and step of the whole layer."""

    def run() -> object:
        grads = torch.autograd.grad(layer(x_TH), [x_TH, *layer.parameters()], grad_TH, allow_unused=True)
        monge.step(layer)
        return grads

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a busy machine")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    print(machine())
    rows: list[dict[str, object]] = []
    for case in args.cases:
        T, H, I, E, K = CASES[case]
        torch.manual_seed(0)
        x_TH, grad_TH = torch.randn(T, H, requires_grad=True), torch.randn(T, H)
        layer = monge.MoE(H, I, E, K, router="topk")
        runs = {"layer": layer_step(layer, x_TH, grad_TH)}
        for name, (method, options) in ROUTERS.items():
            router = monge.make_router(method, dim=H, num_experts=E, top_k=K, **options)
            runs[name] = router_step(router, x_TH)
        seconds = interleave(runs, repeats=args.repeats, warmup=0.0, clock=clock)
        rest = seconds.pop("layer") - seconds["topk"]  # the step without its router
        without, with_transport = seconds.pop("ssr without transport"), seconds.pop("ssr with transport")
        seconds[f"ssr, p = {P}"] = P * with_transport + (1 - P) * without
        seconds["ssr, a transport step"] = with_transport
        share = {name: s / (s + rest) for name, s in seconds.items()}
        ms = {name: 1000 * s for name, s in seconds.items()}
        rows.append({"case": case, "share": share, "ms": ms, "ms_rest": 1000 * rest})
        shown = "  ".join(f"{name} {v:.1%} ({ms[name]:.1f} ms)" for name, v in share.items())
        print(f"{case:14} rest of the step {1000 * rest:.0f} ms | {shown}", flush=True)
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
