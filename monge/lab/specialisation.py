"""What experts have to do with kinds of text or image: the mutual information of expert and domain.

Shapes: D domains, L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mutual_information(loads_DLE: Tensor) -> float:
    """``sum_de p_de ln(p_de / (p_d p_e))`` in nats, mean over layers; 0: an expert tells nothing of the
    domain.

    At most ln D, where every expert serves one domain. A plug-in estimate: from few slots it is biased
    upwards, by about (D - 1)(E - 1) / (2 slots).

    Args:
        loads_DLE: slots of every expert by domain.

    Examples:
        >>> import torch
        >>> from monge.lab.specialisation import mutual_information
        >>> apart = torch.tensor([[[8.0, 0.0]], [[0.0, 8.0]]])  # two domains, one layer, two experts
        >>> round(mutual_information(apart), 4), mutual_information(torch.ones(2, 1, 2))
        (0.6931, 0.0)
    """
    joint_DLE = loads_DLE.double() / loads_DLE.double().sum(dim=(0, 2), keepdim=True)
    independent_DLE = joint_DLE.sum(dim=2, keepdim=True) * joint_DLE.sum(dim=0, keepdim=True)
    ratio_DLE = torch.where(joint_DLE > 0, joint_DLE / independent_DLE, 1.0)
    return max(0.0, float((joint_DLE * ratio_DLE.log()).sum(dim=(0, 2)).mean()))
