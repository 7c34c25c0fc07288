"""Train a small byte-level language model with balanced experts on several processes, by DDP or FSDP2.

    torchrun --nproc-per-node 2 examples/train_ddp.py --router prices --out runs/ddp
    torchrun --nproc-per-node 8 examples/train_ddp.py --router ssr --fsdp --out runs/fsdp

On GPUs it runs on NCCL, on CPUs on gloo. Every process takes its share of the same batch, and
`monge.routing.use_group` balances over all of it: the loss does not depend on the number of processes. The
text is this repository's documentation unless --text names other files. The same command goes on after an
interruption, on as many processes as there are then.

Shapes: B sequences of this process, S context, H width, V bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launching import Checkpoints, job, mean_over_ranks, new_group, say
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import monge
from monge.routing import use_group

S, H, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 16
ROOT = Path(__file__).parents[1]


class Block(nn.Module):
    """Causal attention, then experts."""

    def __init__(self, layer: int, router: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(H) for _ in range(2))
        self.qkv, self.out = nn.Linear(H, 3 * H, bias=False), nn.Linear(H, H, bias=False)
        self.moe = monge.MoE(H, 64, 8, 2, router=router, router_options={"layer": layer})

    def forward(self, x_BSH: Tensor) -> Tensor:
        B = len(x_BSH)
        heads = self.qkv(self.norms[0](x_BSH)).view(B, S, 3, HEADS, H // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BSH = x_BSH + self.out(mixed.transpose(1, 2).reshape(B, S, H))
        return x_BSH + self.moe(self.norms[1](x_BSH))


class ByteModel(nn.Module):
    """256 logits for the next byte."""

    def __init__(self, router: str) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, H), nn.Parameter(0.02 * torch.randn(S, H))
        self.blocks = nn.ModuleList(Block(layer, router) for layer in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(H), nn.Linear(H, 256, bias=False)

    def forward(self, bytes_BS: Tensor) -> Tensor:
        x_BSH = self.bytes(bytes_BS) + self.places
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(self.norm(x_BSH))


def batch_of(text_N: Tensor, step: int) -> Tensor:
    """(b, S + 1), the share of this process of the batch that all of them make up."""
    generator = torch.Generator().manual_seed(step)
    starts_B = torch.randint(len(text_N) - S - 1, (BATCH,), generator=generator)
    mine_B = starts_B[dist.get_rank() :: dist.get_world_size()]
    return text_N[mine_B[:, None] + torch.arange(S + 1)].long()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """All steps. What holds the process group, such as DDP, is gone when this returns: see `job`."""
    if BATCH % dist.get_world_size():
        raise SystemExit(f"the batch of {BATCH} wants a number of processes that divides it")
    files = args.text or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text_N = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    torch.manual_seed(0)  # the same weights everywhere
    model: nn.Module = ByteModel(args.router).to(device)
    use_group(model, new_group(args.timeout))  # apart from the messages of DDP
    model = fully_shard(model) if args.fsdp else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoints = Checkpoints(args.out)
    first = checkpoints.load(model, optimizer)
    say(f"{dist.get_world_size()} processes ({dist.get_backend()}), from step {first}")
    for step in range(first, args.steps):
        bytes_BS = batch_of(text_N, step).to(device)
        with monge.watch(model) as watched:
            logits_BSV = model(bytes_BS[:, :-1])
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), bytes_BS[:, 1:].flatten())
        (loss + monge.aux_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        monge.step(model)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            checkpoints.save(step + 1, model, optimizer)
            violation = watched.metrics()["total"]["max_violation"]
            say(f"step {step + 1}: loss {mean_over_ranks(loss):.6f}, max violation {violation:.2f} here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--router", default="prices", help="a name in monge.routing.ROUTERS")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 (fully_shard) in place of DDP")
    parser.add_argument("--text", nargs="+", type=Path, help="text files")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of silence that end the job")
    args = parser.parse_args()
    with job(args.out, args.timeout) as device:
        train(args, device)


if __name__ == "__main__":
    main()
