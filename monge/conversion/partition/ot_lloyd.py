"""OT-Lloyd: neurons and a linear router in turns, each optimal given the other; closed forms only.

Shapes: T tokens, H model width, F neurons, R routed neurons, N routed experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from monge.conversion.partition.neurons import neuron_energy, split_off, with_shared
from monge.conversion.router_fit import RidgeRouter, energy_of
from monge.conversion.types import ExpertShape, LayerSample, Partition
from monge.ot import balanced_partition

ROUNDS = 12
SETTLED = 0.01  # stop when fewer neurons than this share change their expert


def divide_by_captured_energy(sample: LayerSample, shape: ExpertShape, seed: int) -> Partition:
    """Lloyd's algorithm on the energy that top-k routing captures; assignments are exact optimal transport.

    With the energy ``e_tf = w_t h_tf^2 |wd_f|^2`` of neuron f at token t, and labels from the round before:

    1. router: ridge regression of the experts' amplitudes ``(sum_{f in n} e_tf)^(1/2)`` on x_t;
    2. tokens: each goes to the k experts of its largest logits, S_tn in {0, 1};
    3. neurons: the balanced partition of largest captured energy ``sum_n sum_{f in n} (e^T S)_fn``.

    The neurons of largest mean energy are shared and take no part. The start is a random balanced partition.
    At most 12 rounds; it ends sooner when fewer than 1 % of the neurons move. The
    router returned is that of the final labels.

    Raises:
        ValueError: activations that are not finite.
    """
    routed_R = split_off(neuron_energy(sample), shape)
    count = shape.routed
    energy_TR = energy_of(sample, routed_R)
    router = RidgeRouter(sample.x_TH)
    order_R = torch.randperm(len(routed_R), generator=torch.Generator().manual_seed(seed))
    labels_R = (torch.arange(len(routed_R)) % count)[order_R].to(routed_R.device)
    for _ in range(ROUNDS):
        chosen_TN = _choose(sample.x_TH, router.fit(_amplitudes(energy_TR, labels_R, count)), shape.top_k)
        before_R, labels_R = labels_R, balanced_partition((energy_TR.t() @ chosen_TN).double())
        if (labels_R != before_R).double().mean() < SETTLED:
            break
    router_NH = router.fit(_amplitudes(energy_TR, labels_R, count))
    return Partition(with_shared(routed_R, labels_R, shape), router_NH=router_NH)


def _amplitudes(energy_TR: Tensor, labels_R: Tensor, count: int) -> Tensor:
    return (energy_TR @ nnf.one_hot(labels_R, count).to(energy_TR)).sqrt()


def _choose(x_TH: Tensor, router_NH: Tensor, top_k: int) -> Tensor:
    """(T, N) 1 at the chosen experts."""
    logits_TN = x_TH @ router_NH.t()
    return torch.zeros_like(logits_TN).scatter_(1, logits_TN.topk(top_k).indices, 1.0)
