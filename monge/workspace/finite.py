"""Whether every value of a tensor is finite: asked of all weights that are read or written."""

from __future__ import annotations

from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """True if no value is NaN or infinite.

    A finite sum has finite terms, and is taken ten times faster than each term is looked at; only where the
    sum is not finite, which large finite terms can bring about too, they are.

    Examples:
        >>> import torch
        >>> all_finite(torch.full((2,), 3e38)), all_finite(torch.tensor([1.0, float("inf")]))
        (True, False)
    """
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
