"""What monge.ot.sinkhorn says to bad input: which argument, what it got, what to do."""

from __future__ import annotations

import pytest
import torch

from monge.ot import sinkhorn

INF = float("inf")
GOOD = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": torch.tensor([[0.0, float("nan")]])}, "scores hold NaN or [+]inf"),
        ({"scores": torch.tensor([[0.0, INF]])}, "scores hold NaN or [+]inf"),
        ({"scores": torch.tensor([[-INF, -INF], [0.0, 0.0]])}, "scores leave 1 rows .* nowhere to go"),
        ({"scores": torch.tensor([[-INF, 0.0], [-INF, 0.0]])}, r"scores are -inf .* columns \[0\]"),
        (
            {"scores": torch.tensor([[-INF, 0.0], [0.0, 0.0]]), "col_mass": torch.tensor([1.0, 0.0])},
            "scores leave 1 rows",
        ),
        (
            {"scores": torch.tensor([[1e300, 0.0]], dtype=torch.float64), "epsilon": 1e-9},
            "scores up to 1e[+]300 .*scale",
        ),
        ({"scores": torch.zeros(3)}, r"scores must have shape \(\.\.\., T, E\).*got \(3,\)"),
        ({"scores": torch.zeros(3, 0)}, r"E >= 1, got \(3, 0\)"),
        ({"scores": torch.zeros(3, 2, dtype=torch.int64)}, r"torch.int64: convert them with \.float"),
        ({"epsilon": 0.0}, "epsilon must be a positive number, got 0.0"),
        ({"epsilon": float("nan")}, "epsilon must be a positive number, got nan"),
        ({"tol": -1.0}, "tol must be at least 0, got -1.0"),
        ({"max_iters": 0}, "max_iters must be at least 1, got 0"),
        ({"backward": "autograd"}, "backward must be one of implicit, unrolled, none, got 'autograd'"),
        ({"noise": -0.1}, "noise must be a standard deviation .* got -0.1"),
        ({"row_mass": torch.ones(2)}, r"row_mass must have shape \(3,\) for scores .* got \(2,\)"),
        ({"col_mass": torch.ones(3)}, r"col_mass must have shape \(2,\) for scores .* got \(3,\)"),
        ({"col_mass": torch.ones(1, 2)}, r"col_mass must have shape \(2,\)"),
        ({"row_mass": torch.tensor([1.0, -1.0, 1.0])}, "row_mass holds negative"),
        ({"row_mass": torch.tensor([1.0, float("nan"), 1.0])}, "row_mass holds negative, NaN"),
        ({"col_mass": torch.tensor([1.0, INF])}, "col_mass holds negative, NaN or infinite"),
        ({"col_mass": torch.zeros(2)}, "col_mass is zero in every column"),
        ({"mask": torch.ones(3)}, "mask must be boolean"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must have shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("backward", ["implicit", "unrolled"])
def test_value_errors(options, message, backward):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"scores": GOOD, "backward": backward, **options})


@pytest.mark.parametrize("name", ["scores", "row_mass", "col_mass", "mask"])
def test_type_errors(name):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        sinkhorn(**{"scores": GOOD, name: [1.0, 2.0]})


def test_shape_message_offers_both_shapes_of_a_batch():
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 3\) or \(3,\) .*got \(4,\)"):
        sinkhorn(torch.zeros(4, 3, 2), mask=torch.ones(4, dtype=torch.bool))


def test_unrolling_does_not_cross_ranks():
    with pytest.raises(ValueError, match="use backward='implicit'"):
        sinkhorn(GOOD, backward="unrolled", group=object())
