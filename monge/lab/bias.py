"""What training did to a router bias that started unequal, and whether it could have done anything.

Transport absorbs a constant per column: the gradient through Sinkhorn to a per-expert bias is zero, so SSR's
transport steps never correct it (`monge.routing.ssr`). Here that is measured in the trained model.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monge.lab.config import ExperimentConfig
from monge.lab.examples import Examples, losses_of
from monge.lab.models import moe_layers
from monge.routing import aux_loss, training_routes


def bias_figures(model: nn.Module, batch: Examples, config: ExperimentConfig) -> dict[str, Any]:
    """``bias_gap``: mean bias of the experts favoured at the start less that of the others, where it ends (it
    started at ``router_bias``). ``bias_gradient``: norm of the gradient of the training loss to the bias on
    one batch, routed as in training (SSR: a transport step), auxiliary losses included. Means over layers;
    None without such a bias, or where it is fixed (hash).
    """
    of_layers: list[Any] = [layer.router.bias for layer in moe_layers(model).values()]
    biases: list[Tensor] = [bias for bias in of_layers if bias is not None and bias.requires_grad]
    if not biases or not config.router_bias:
        return {"bias_gap": None, "bias_gradient": None}
    bias_LE = torch.stack([bias.detach() for bias in biases]).cpu().double()
    favoured = config.biased_experts
    gap_L = bias_LE[:, :favoured].mean(dim=1) - bias_LE[:, favoured:].mean(dim=1)
    return {"bias_gap": float(gap_L.mean()), "bias_gradient": _gradient(model, biases, batch)}


@torch.enable_grad()
def _gradient(model: nn.Module, biases: list[Tensor], batch: Examples) -> float:
    before = model.training
    model.train()
    torch.manual_seed(0)  # for routers that add noise
    try:
        with training_routes(model):
            loss = losses_of(model, batch).mean() + aux_loss(model)
        grads = torch.autograd.grad(loss, biases, allow_unused=True)
    finally:
        model.train(before)
    norms = [0.0 if grad is None else float(grad.norm()) for grad in grads]
    return sum(norms) / len(norms)
