"""Train the quick preset of `monge compare` with its experts spread over several processes.

    torchrun --nproc-per-node 4 examples/train_expert_parallel.py --out runs/experts
    torchrun --nproc-per-node 4 examples/train_expert_parallel.py --replicas 2 --out runs/replicas   # 2 x 2

Model, text, batches and learning rates are those of one `monge compare --preset quick` run with seed 0.
Every process takes its share of each batch and holds its share of the experts
(`monge.moe.parallel.shard_experts`), and all balance over the whole batch: the losses are those of one
process, up to rounding. The same command goes on after an interruption, on as many processes as there are
then. Needs the extra `lab`.

Shapes: N windows, S context, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launching import Checkpoints, job, mean_over_ranks, new_group, say
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import monge
from monge.lab import PRESETS, CompareConfig
from monge.lab.evaluation import mean_loss
from monge.lab.examples import window_examples
from monge.lab.models import build_model
from monge.lab.optimisation import batch_of, learning_rate, make_optimizer
from monge.lab.tokenizer import load_corpus
from monge.moe.parallel import clip_gradients, expert_parameters, shard_experts
from monge.routing import use_group
from monge.workspace.text import find_domains


def mine(windows_NS: Tensor) -> Tensor:
    """This process's share of the windows, as many as every other's."""
    ranks = dist.get_world_size()
    return windows_NS[dist.get_rank() : len(windows_NS) // ranks * ranks : ranks]


def optimizer_of(model: nn.Module, config: CompareConfig) -> torch.optim.Optimizer:
    """The preset's AdamW, experts in groups of their own: DTensors do not mix with other tensors."""
    experts = expert_parameters(model)
    groups = []
    for group in make_optimizer(model, config).param_groups:
        for inside in (True, False):
            weights = [weight for weight in group["params"] if (weight in experts) == inside]
            groups.append({**group, "params": weights})
    return torch.optim.AdamW([group for group in groups if group["params"]])


def train(args: argparse.Namespace, device: torch.device) -> None:
    """All steps, and the validation. What holds the process group, such as DDP, is gone then: see `job`."""
    config = dataclasses.replace(PRESETS["quick"], text=tuple(args.text), device=str(device))
    if args.steps:
        config = dataclasses.replace(config, steps=args.steps, warmup=min(config.warmup, args.steps))
    ranks = dist.get_world_size()
    if config.batch % ranks or ranks % args.replicas:
        raise SystemExit(
            f"{ranks} processes with {args.replicas} replicas: processes must divide the batch of "
            f"{config.batch}, and replicas the processes"
        )
    corpus = load_corpus(find_domains(config.text), config)
    model = build_model(args.router, config, seed=0)
    shape = (args.replicas, ranks // args.replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "experts"))
    shard_experts(model, mesh if args.replicas > 1 else mesh["experts"])
    use_group(model, new_group(args.timeout))
    parallel = DistributedDataParallel(model)
    optimizer = optimizer_of(model, config)
    checkpoints = Checkpoints(args.out)
    first = checkpoints.load(model, optimizer)
    say(f"{ranks} processes ({dist.get_backend()}), {args.replicas} replicas, from step {first}")
    for step in range(first, config.steps):
        tokens_NS = mine(batch_of(corpus.train_NS, config.batch, 0, step)).to(device)
        logits_NSV = parallel(input_ids=tokens_NS[:, :-1]).logits
        loss = F.cross_entropy(logits_NSV.flatten(0, 1), tokens_NS[:, 1:].flatten())
        (loss + monge.aux_loss(model)).backward()
        clip_gradients(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        monge.step(model)
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoints.save(step + 1, model, optimizer)
            say(f"step {step + 1}: loss {mean_over_ranks(loss):.4f}")
    whole = len(corpus.val_NS) // config.batch * config.batch  # the same for any number of processes
    validation = window_examples(mine(corpus.val_NS[: whole or None]))
    val_loss = torch.tensor(mean_loss(model, validation, config), device=device)
    say(f"validation loss {mean_over_ranks(val_loss):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--router", default="prices", help="a name in monge.routing.ROUTERS")
    parser.add_argument(
        "--replicas", type=int, default=1, help="copies of the experts; must divide the processes"
    )
    parser.add_argument("--text", nargs="*", default=[], help="text files, one quoted glob per domain")
    parser.add_argument("--steps", type=int, help="the preset's 600 by default")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of silence that end the job")
    args = parser.parse_args()
    with job(args.out, args.timeout) as device:
        train(args, device)


if __name__ == "__main__":
    main()
