"""The solvers on another device than the CPU: on a pretended one, and on an accelerator if there is one."""

from __future__ import annotations

import pytest
import torch
from pretended import pretended_device

from monge.ot import (
    assign,
    balanced_partition,
    margin_prices,
    quantile_prices,
    sign_prices,
    sinkhorn,
    soft_topk,
)

T, E, K, C = 96, 8, 2, 30


def scores() -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


SOLVERS = {
    "assign": lambda s: assign(s, K, capacity=C).indices,
    "assign batched": lambda s: assign(s.view(4, T // 4, E), K, capacity=C // 4 + 1).indices,
    "assign approximately": lambda s: assign(s, K, capacity=C, method="approximate").indices,
    "prices of an assignment": lambda s: assign(s, K, capacity=C).prices,
    "sinkhorn": lambda s: sinkhorn(s, epsilon=0.1).plan,
    "soft_topk": lambda s: soft_topk(s, K),
    "balanced_partition": lambda s: balanced_partition(s),
    "margin_prices": lambda s: margin_prices(s, K),
    "quantile_prices": lambda s: quantile_prices(s, K),
    "sign_prices": lambda s: sign_prices(
        torch.ones(E, device=s.device), torch.zeros(E, device=s.device), 0.1
    ),
}


def value_of(found: object) -> torch.Tensor:
    assert isinstance(found, torch.Tensor)
    return found.detach().cpu()


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_on_a_pretended_device_nothing_meets_the_cpu(solve):
    expected = value_of(solve(scores()))
    with pretended_device() as device:
        result = solve(scores().to(device))
        assert result.device == device
        found = value_of(result)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_on_an_accelerator_the_answer_is_that_of_the_cpu(solve):
    device = torch.accelerator.current_accelerator()
    result = solve(scores().to(device))
    assert result.device.type == device.type
    torch.testing.assert_close(value_of(result), value_of(solve(scores())), rtol=1e-6, atol=1e-6)
