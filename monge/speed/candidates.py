"""What is timed: the experts by Monge's table of paths, the dense FFN they are cut from, transformers' paths.

All get the same hidden states, routings and gates, and share their weights.

Shapes: T tokens, K experts per token, E experts, H model width, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monge.hf.experts import THEIRS
from monge.moe import Experts

DENSE, MONGE = "dense", "monge"
ROUTINGS = 8  # that a case goes through: a decode step reads other experts than the one before
BATCHED_LIMIT = 2**28  # bytes of weights that batched_mm copies: beyond, it is left out


class DenseFFN(nn.Module):
    """The SwiGLU feed-forward network of a given width."""

    def __init__(self, H: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(H, width, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(width, H, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def routed(
    T: int, H: int, E: int, K: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a random routing with renormalised gates."""
    gates_TK, indices_TK = torch.randn(T, E).softmax(dim=1).topk(K, dim=1)
    gates_TK /= gates_TK.sum(dim=1, keepdim=True)
    return torch.randn(T, H).to(device, dtype), indices_TK.to(device), gates_TK.to(device)


def transformers_experts(experts: Experts, implementation: str) -> nn.Module:
    """Mixtral's experts with the same weights, computed in the named way.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=experts.dim, intermediate_size=experts.hidden, num_local_experts=experts.num_experts
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        theirs: Any = MixtralExperts(config)
    theirs.gate_up_proj, theirs.down_proj = experts.gate_up_proj, experts.down_proj
    return theirs


def candidates(
    H: int,
    I: int,
    E: int,
    K: int,
    T: int,
    dtype: torch.dtype,
    dense_width: int,
    device: str = "cpu",
    *,
    backward: bool,
) -> dict[str, Callable[[], object]]:
    """The dense FFN, ours and transformers', as callables without arguments.

    Args:
        dense_width: neurons of the dense FFN: E I is what the experts are cut from, K I of equal FLOPs.
        backward: forward and backward, instead of a forward without gradients.
    """
    torch.manual_seed(0)
    batches = [routed(T, H, E, K, dtype, device) for _ in range(ROUTINGS)]
    experts = Experts(H, I, E, dtype=dtype).to(device)
    dense = DenseFFN(H, dense_width, dtype).to(device)
    modules: dict[str, nn.Module] = {MONGE: experts}
    for name in THEIRS:
        copied = T * K * 3 * H * I * dtype.itemsize
        if name != "batched_mm" or copied <= BATCHED_LIMIT:
            modules[name] = transformers_experts(experts, name)
    grad_TH = torch.randn(T, H).to(device, dtype)

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

    runs = {DENSE: call(lambda x, indices, weights: dense(x), list(dense.parameters()))}
    for name, module in modules.items():
        gates = (lambda w: w) if name == MONGE else (lambda w: w.to(dtype))
        runs[name] = call(
            lambda x, indices, weights, module=module, gates=gates: module(x, indices, gates(weights)),  # type: ignore[misc]
            list(module.parameters()),
        )
    return runs
