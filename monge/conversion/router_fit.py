"""Closed-form routers: ridge regression of what each expert is worth to a token.

Shapes: T tokens, H model width, F neurons, N routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monge.conversion.refit import ridge
from monge.conversion.types import LayerSample

LAMBDA = 1e-2  # of the mean diagonal of x^T x


def energy_of(sample: LayerSample, neurons: Tensor) -> Tensor:
    """(T, n) ``w_t h_tf^2 |wd_f|^2``: what a neuron contributes to the weighted squared output, alone."""
    squared_n = sample.weights.down_HF[:, neurons].square().sum(0)
    energy_Tn = sample.hidden_TF[:, neurons]
    return energy_Tn.square_().mul_(squared_n).mul_(sample.weight_T[:, None])


def expert_energy(sample: LayerSample, labels_F: Tensor, experts: int) -> Tensor:
    """(T, N) the energy of the neurons of each expert; its root is what routers are fitted to.

    The root, since energies have heavy tails, and least squares would fit a few tokens. On SmolLM2, 25 %
    active, it lowers a layer's error by 3 to 4 %, and the perplexity with a third of the layers converted
    from 1.376 to 1.336 times the dense model's.
    """
    routed = torch.where(labels_F >= 0)[0]
    energy_TN = sample.x_TH.new_zeros((len(sample.x_TH), experts))
    return energy_TN.index_add_(1, labels_F[routed], energy_of(sample, routed))


class RidgeRouter:
    """Ridge regression on the inputs of one layer; the factorisation serves every right-hand side."""

    def __init__(self, x_TH: Tensor) -> None:
        self.x_TH = x_TH
        self.gram_HH = (x_TH.t() @ x_TH).double()

    def fit(self, target_TN: Tensor) -> Tensor:
        """(N, H): the router whose logits ``x @ R.T`` best predict the targets, scaled to deviation 1.

        ``R = scale * (x^T x + lambda d I)^-1 x^T target``. The scale does not change the choice of experts.
        """
        energy_H = self.gram_HH.diagonal()
        penalty_H = LAMBDA * energy_H.mean().expand_as(energy_H)
        router_HN = ridge(self.gram_HH, self.x_TH.t() @ target_TN, penalty_H)
        router_NH = router_HN.t().to(self.x_TH.dtype)
        return unit_logits(router_NH, self.x_TH)


def unit_logits(router_NH: Tensor, x_TH: Tensor) -> Tensor:
    """The router scaled so that its logits on ``x_TH`` have standard deviation 1 (or are all zero)."""
    deviation = (x_TH @ router_NH.t()).std()
    return (router_NH / deviation.clamp_min(torch.finfo(x_TH.dtype).tiny)).contiguous()
