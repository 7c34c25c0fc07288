"""Every compute path against autograd through the formula itself, in float64; memory and dtypes too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_cases import FUNCTIONS, UNGATED, assert_same, formula, gradients, problem
from torch import Tensor
from torch.nn import functional as F

from monge.moe.activations import ACTIVATIONS
from monge.moe.compute import PATHS
from monge.moe.compute.grouped_mm import kernel_takes

PATH_NAMES = list(PATHS)


def test_every_activation_has_a_reference():
    assert FUNCTIONS.keys() == ACTIVATIONS.keys()
    assert {name for name, act in ACTIVATIONS.items() if not act.gated} == UNGATED


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("path", PATH_NAMES)
def test_path_equals_the_formula(path, activation):
    args = problem(T=23, K=3, E=7, activation=activation)
    assert_same(gradients(PATHS[path], args), gradients(formula, args), args[1])


@pytest.mark.parametrize("path", PATH_NAMES)
@given(data=st.data())
def test_path_equals_the_formula_at_any_shape(path, data):
    T, E = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    K = data.draw(st.integers(1, E))
    empty = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    args = problem(T, K, E, empty=empty, seed=data.draw(st.integers(0, 99)))
    assert_same(gradients(PATHS[path], args), gradients(formula, args), args[1])


@pytest.mark.parametrize("path", PATH_NAMES)
def test_kernel_shapes_in_float32(path):
    """Rows of a multiple of 16 bytes, so that torch's grouped kernel runs; one expert gets no token."""
    args = problem(T=40, K=2, E=5, H=16, hidden=8, dtype=torch.float32)
    args[1][args[1] == 3] = -1
    assert kernel_takes(args[0], args[3], args[4])
    reference = [
        v.double()
        for v in gradients(
            formula,
            tuple(
                v.detach().double().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
                for v in args
            ),
        )
    ]
    assert_same([v.double() for v in gradients(PATHS[path], args)], reference, args[1], tol=2e-5)
    assert (gradients(PATHS[path], args)[3][3] == 0).all()


@pytest.mark.parametrize("path", PATH_NAMES)
def test_gradcheck(path):
    x, indices, w, a, d, act = problem(T=4, K=2, E=3, H=3, hidden=2)
    torch.autograd.gradcheck(lambda x, w, a, d: PATHS[path](x, indices, w, a, d, act), (x, w, a, d))


@pytest.mark.parametrize("path", PATH_NAMES)
def test_a_token_may_take_one_expert_twice(path):
    args = list(problem(T=3, K=2, E=3))
    args[1] = torch.tensor([[1, 1], [0, 2], [2, 2]])
    assert_same(gradients(PATHS[path], args), gradients(formula, args), args[1])


@pytest.mark.parametrize("path", PATH_NAMES)
def test_an_expert_without_tokens_gets_zero_gradients(path):
    args = problem(T=5, K=1, E=3, empty=0)
    args[1].fill_(1)
    for grad in gradients(PATHS[path], args)[3:]:
        assert (grad[[0, 2]] == 0).all()
        assert (grad[1] != 0).any()


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (0, 1), (1, 3)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(path, trained):
    x, indices, w, a, d, act = problem(T=9, K=2, E=4)
    full = gradients(PATHS[path], (x, indices, w, a, d, act))
    leaves = [v.detach().requires_grad_(i in trained) for i, v in enumerate((x, w, a, d))]
    out = PATHS[path](leaves[0], indices, *leaves[1:], act)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    for i, leaf in enumerate(leaves):
        if i in trained:
            torch.testing.assert_close(leaf.grad, full[i + 1], rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_slots_in_float32(path, dtype):
    """K = 64 equal slots: several per cent off if summed in bfloat16, one rounding if in float32."""
    K, H = 64, 8
    x = torch.ones(1, H, dtype=dtype)
    a = torch.ones(K, 2 * H, H, dtype=dtype) / 8
    d = torch.eye(H, dtype=dtype).repeat(K, 1, 1)
    weights = torch.full((1, K), 1.01 / K)
    out = PATHS[path](x, torch.arange(K)[None], weights, a, d, "swiglu")
    expected = F.silu(torch.ones(1)).to(dtype).double() * 1.01
    assert out.dtype == dtype
    assert abs(out.double() - expected).max() <= torch.finfo(dtype).eps * expected


@pytest.mark.parametrize("path", PATH_NAMES)
def test_low_precision_gradients_are_close(path):
    args = problem(T=31, K=2, E=4, H=16, hidden=8, dtype=torch.bfloat16)
    exact = tuple(
        v.detach().double().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in args
    )
    for low, high in zip(gradients(PATHS[path], args), gradients(formula, exact)):
        high = high * (args[1] >= 0) if high.shape == args[1].shape else high
        assert (low.double() - high).norm() <= 0.02 * high.norm()


@pytest.mark.parametrize("path", PATH_NAMES)
def test_same_bits_every_time(path):
    torch.set_num_threads(2)
    args = problem(T=257, K=4, E=8, H=32, hidden=16, dtype=torch.float32)
    first = gradients(PATHS[path], args)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(PATHS[path], args)))


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_no_uninitialised_memory_is_read(path, padded, monkeypatch):
    """Deterministic mode fills new memory with NaN, and refuses operators that may differ from run to run."""
    args = problem(T=21, K=2, E=5, H=16, hidden=8, dtype=torch.float32, empty=0.4)
    args[1][args[1] == 3] = -1
    expected = gradients(PATHS[path], args)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: padded)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        ours = gradients(PATHS[path], args)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(path, bad):
    """Empty slots point at a row of zeros, never at another token's: NaN there must not spread."""
    x, indices, w, a, d, act = problem(T=6, K=2, E=3, empty=0)
    indices[3], w = -1, w.detach().clone()
    w[3] = 0
    x = x.detach().clone()
    x[0] = bad
    out = PATHS[path](x, indices, w, a.detach(), d.detach(), act)
    assert torch.isfinite(out[1:]).all()
    assert (out[3] == 0).all()


def saved_bytes(function, args, params):
    """Bytes of what autograd keeps, parameters aside, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*args)
    for p in params:
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(kept.values()), out


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frozen", [False, True])
def test_saved_bytes_are_the_formula(path, dtype, frozen):
    """T H b + R J b + T K (8 + w), without the first term when the input projection is frozen."""
    T, K, E, H, hidden = 37, 3, 5, 16, 8
    x, indices, w, a, d, act = problem(T, K, E, H, hidden, dtype=dtype)
    a = a.detach().requires_grad_(not frozen)
    N, J = int((indices >= 0).sum()), 2 * hidden
    assert N < T * K
    R = E * T if path == "masked" else N
    expected = R * J * x.itemsize + T * K * (8 + w.itemsize) + (0 if frozen else T * H * x.itemsize)
    saved, _ = saved_bytes(PATHS[path], (x, indices, w, a, d, act), (a, d))
    assert saved == expected


@pytest.mark.parametrize("path", PATH_NAMES)
def test_inference_saves_nothing(path):
    args = problem(T=9, K=2, E=4)
    with torch.no_grad():
        saved, out = saved_bytes(PATHS[path], args, args[3:5])
    assert saved == 0
    assert torch.equal(out, PATHS[path](*args))


@pytest.mark.parametrize("path", PATH_NAMES)
def test_second_derivatives_are_refused(path):
    args = problem(T=4, K=2, E=3)
    (grad,) = torch.autograd.grad(PATHS[path](*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), args[0])


@pytest.mark.parametrize("path", PATH_NAMES)
def test_operator_is_registered_soundly(path):
    """torch's own check of schema, fake implementation and autograd registration."""
    x, indices, w, a, d, act = problem(T=5, K=2, E=3, empty=0)
    operator = getattr(torch.ops.monge, f"experts_{path}").default
    torch.library.opcheck(operator, (x, indices, w, a, d, act, True, True), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_what_overflows_in_an_expert_that_is_not_chosen_does_no_harm(path):
    x, indices, w, a, d, act = problem(T=6, K=2, E=4, empty=0, dtype=torch.float32)
    indices[:] = torch.tensor([0, 2])
    with torch.no_grad():
        a[3] = 1e38
    found = gradients(PATHS[path], (x, indices, w, a, d, act))
    assert not (x @ a[3].T).isfinite().all()
    assert all(value.isfinite().all() for value in found)
    assert (found[3][3] == 0).all()
    assert (found[4][3] == 0).all()
