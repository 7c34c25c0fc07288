"""The whole layer beside public ones: `python -m benchmarks.peers_layer` (extra `peers`).

A forward, and a forward and backward, of a mixture of 16 experts, two per token, width 512, on 2,048 tokens;
router, dispatch and combination included. All layers have as many parameters in their experts, to within
rounding: SwiGLU of 1024 neurons, GEGLU of 1024 (st-moe-pytorch) or ReLU of 1536 (mixture-of-experts). The
public two fill a static capacity, here as many places as there are slots, and drop what exceeds it; the share
is printed beside the time. Their own capacity factor counts tokens, not slots: 2 is an equal share for top-2.

Shapes: B sequences, L tokens, H model width, E experts, K experts per token, I expert width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import monge
from benchmarks.figures import machine, write_json
from monge.speed.timing import interleave

B, L, H, E, K, I = 4, 512, 512, 16, 2, 1024
CAPACITY = float(K)
OURS = ("topk", "switch", "prices", "ssr", "maxscore")


def mixtral(implementation: str) -> nn.Module:
    """transformers' block, its experts computed in the named way."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def public() -> dict[str, nn.Module]:
    """The layers of st-moe-pytorch and mixture-of-experts.

    Raises:
        ImportError: they are not installed.
    """
    try:
        import mixture_of_experts
        import st_moe_pytorch
    except ImportError as error:
        raise ImportError("this needs the peers: pip install -c constraints.txt -e '.[peers]'") from error
    st_moe = st_moe_pytorch.MoE(
        dim=H, num_experts=E, gating_top_n=K, expert_hidden_mult=3, capacity_factor_train=CAPACITY,
        capacity_factor_eval=CAPACITY, threshold_train=0.0, threshold_eval=0.0,
    )  # fmt: skip
    mixture = mixture_of_experts.MoE(
        dim=H, num_experts=E, hidden_dim=3 * I // 2, second_policy_train="all", second_policy_eval="all",
        capacity_factor_train=CAPACITY, capacity_factor_eval=CAPACITY,
    )  # fmt: skip
    return {"st-moe-pytorch": st_moe, "mixture-of-experts": mixture}


def layers() -> dict[str, nn.Module]:
    """Ours by router, transformers' by implementation, the public ones."""
    torch.manual_seed(0)
    ours: dict[str, nn.Module] = {f"monge {name}": monge.MoE(H, I, E, K, router=name) for name in OURS}
    theirs = {f"transformers {name}": mixtral(name) for name in ("eager", "grouped_mm")}
    return ours | theirs | public()


def dropped(layer: nn.Module, x_BLH: Tensor) -> float | None:
    """Share of the slots that a public layer leaves out, from its dispatch tensor; None for the others."""
    gate = getattr(layer, "gate", None)
    if not type(layer).__module__.startswith(("st_moe", "mixture_of")) or gate is None:
        return None
    with torch.no_grad():
        dispatched = gate(x_BLH)[0]
    return 1 - float((dispatched > 0).sum()) / (K * x_BLH.shape[0] * x_BLH.shape[1])


def call(layer: nn.Module, x_BLH: Tensor, *, backward: bool) -> Callable[[], object]:
    """A forward, or a training step without its optimizer; the auxiliary loss of each layer is part of it."""
    ours = isinstance(layer, monge.MoE)

    def run() -> object:
        with torch.set_grad_enabled(backward):
            out = layer(x_BLH)
            out_BLH, *losses = out if isinstance(out, tuple) else (out,)
            if not backward:
                return out_BLH
            if ours:
                losses = [monge.aux_loss(layer)]
            loss = out_BLH.square().mean() + sum(losses[:1])
            grads = torch.autograd.grad(loss, [x_BLH, *layer.parameters()], allow_unused=True)
        if ours:
            monge.step(layer)
        return grads

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a busy machine")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(machine())
    rows: list[dict[str, object]] = []
    found = layers()
    x_BLH = torch.randn(B, L, H)
    drops = {name: share for name, layer in found.items() if (share := dropped(layer, x_BLH)) is not None}
    print("dropped slots:", {name: f"{share:.1%}" for name, share in drops.items()})
    for backward in (False, True):
        given = x_BLH.clone().requires_grad_(backward)
        for layer in found.values():
            layer.train(backward)
        runs = {name: call(layer, given, backward=backward) for name, layer in found.items()}
        seconds = interleave(runs, repeats=args.repeats, warmup=0.0, clock=clock)
        times = {name: s / seconds["monge prices"] for name, s in seconds.items()}
        mode = "forward+backward" if backward else "forward"
        ms = {name: 1000 * s for name, s in seconds.items()}
        rows.append({"mode": mode, "over_monge_prices": times, "ms": ms, "dropped": drops})
        print(f"{mode}: monge prices {ms['monge prices']:.0f} ms", flush=True)
        for name, ratio in times.items():
            print(f"  {name:24}{ratio:6.2f}")
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
