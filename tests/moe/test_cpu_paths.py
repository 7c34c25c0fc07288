"""What the compute paths do on the CPU: the table, few rows, threads, precision, buffers."""

from __future__ import annotations

import sys

import pytest
import torch
from path_cases import assert_same, formula, gradients, problem

from monge.moe import activations, compute
from monge.moe.activations import ACTIVATIONS
from monge.moe.compute import PATHS, choose_path, memory, precision
from monge.ot.threads import on_torch_threads

PATH_NAMES = list(PATHS)
SHAPE = (16, 512, 1024)  # E, H, I


def test_auto_is_a_fixed_table(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    small = {(16, 576, 48): 113, (16, 2048, 128): 48, (16, 64, 8): 128, (16, 576, 256): 48, SHAPE: 48}
    every = 10**6
    for fast, tiles in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(compute, "FAST_PRODUCTS", fast)
        monkeypatch.setattr(precision, "has_tiles", lambda tiles=tiles: tiles)
        for experts, rows in small.items():
            narrow = 4 if tiles else every if fast else 48
            last = {torch.float32: every if fast else rows, torch.bfloat16: narrow, torch.float64: rows}
            for dtype, rows in last.items():
                assert choose_path((16 * rows, 1), experts, dtype, cpu) == "gemv"
                if rows < every:
                    assert choose_path((16 * rows + 1, 1), experts, dtype, cpu) == "sorted"
    assert choose_path((1, 1), SHAPE, torch.float16, cpu) == "sorted"
    assert choose_path((2048, 2), SHAPE, torch.bfloat16, cuda) == "grouped_mm"
    assert choose_path((2048, 2), SHAPE, torch.float32, cuda) == "grouped_mm"
    assert choose_path((2048, 2), SHAPE, torch.float32, torch.device("xpu")) == "sorted"
    assert choose_path((512, 2), SHAPE, torch.float32, cuda) == "masked"


@pytest.mark.parametrize("path", ["sorted", "gemv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_units_products_are_float32(path, dtype, monkeypatch):
    """One rounding, of the output: products in bfloat16 round four times."""
    monkeypatch.setattr(precision, "_has_units", lambda dtype: False)
    x, indices, w, a, d, act = problem(T=40, K=2, E=5, H=16, hidden=8, dtype=dtype)
    exact = [v.detach().double().requires_grad_() for v in (x, w, a, d)]
    high = gradients(formula, (exact[0], indices, *exact[1:], act))
    low = gradients(PATHS[path], (x, indices, w, a, d, act))
    assert [v.dtype for v in low] == [dtype, dtype, w.dtype, dtype, dtype]
    error = (low[0].double() - high[0]).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * high[0].abs() + 1e-6).all()
    for ours, theirs in zip(low[1:], high[1:]):  # the pre-activations are kept in ``dtype``
        theirs = theirs * (indices >= 0) if theirs.shape == indices.shape else theirs
        assert (ours.double() - theirs).norm() <= 0.005 * theirs.norm()


@pytest.mark.parametrize("path", ["sorted", "gemv"])
def test_autocast_does_not_narrow_the_products(path, monkeypatch):
    """Autocast chose the dtype of the inputs; it would choose that of the products inside as well."""
    monkeypatch.setattr(precision, "_has_units", lambda dtype: False)
    args = problem(T=40, K=2, E=5, H=16, hidden=8, dtype=torch.bfloat16)
    expected = gradients(PATHS[path], args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(PATHS[path], args)
        with torch.no_grad():
            assert torch.equal(PATHS[path](*args), expected[0])
    for ours, theirs in zip(inside, expected):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("T", [1, 2, 3, 9])
def test_few_rows_at_odd_widths(path, T):
    """The compiled loops take four rows of weights at once: every remainder, on 1 to 3 threads."""
    for H, hidden, threads in ((1, 1, 1), (5, 3, 2), (6, 7, 3), (11, 2, 3), (8, 4, 2)):
        torch.set_num_threads(threads)
        for activation in ("swiglu", "gelu"):
            args = problem(T, K=2, E=3, H=H, hidden=hidden, activation=activation, seed=H)
            assert_same(gradients(PATHS[path], args), gradients(formula, args), args[1])


def test_threads_change_no_bit(monkeypatch):
    """Neither their number nor whether they are torch's own."""
    module = sys.modules["monge.moe.compute.gemv"]
    monkeypatch.setattr(module, "ALONE", 0)
    args = problem(T=13, K=3, E=7, H=36, hidden=22, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(PATHS["gemv"](*args))
    monkeypatch.setattr(module, "openmp_region", lambda: 0)
    monkeypatch.setitem(module.on_threads.__globals__, "_openmp", lambda: None)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        results.append(PATHS["gemv"](*args))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_inputs_need_not_be_contiguous(path):
    x, indices, w, a, d, act = problem(T=7, K=2, E=4, H=6, hidden=5)
    expected = gradients(PATHS[path], (x, indices, w, a, d, act))
    turned = [v.detach().mT.contiguous().mT.requires_grad_() for v in (x, w, a, d)]
    assert not any(v.is_contiguous() for v in turned)
    ours = gradients(PATHS[path], (turned[0], indices.T.contiguous().T, *turned[1:], act))
    assert_same(ours, expected, indices)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_an_expert_that_is_not_there_is_an_error(path):
    x, indices, w, a, d, act = problem(T=3, K=2, E=4, empty=0)
    indices[1, 1] = 4
    with pytest.raises((IndexError, RuntimeError)):
        PATHS[path](x, indices, w, a, d, act)


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_can_be_freed_as_fsdp_frees_them(path, dtype):
    """numpy's hold on a tensor would forbid to resize its storage, also after it has let go."""
    x, indices, w, a, d, act = problem(T=3, K=2, E=5, H=16, hidden=8, dtype=dtype)
    PATHS[path](x, indices, w, a, d, act)
    for weight in (a, d):
        weight.untyped_storage().resize_(0)


def test_large_buffers_look_like_torch_ones():
    like = torch.ones(1, dtype=torch.bfloat16)
    for shape, dtype in (
        ((3, 2**20), None),
        ((2**21,), torch.float32),
        ((3, 4), None),
        ((0, 5), torch.float64),
    ):
        buffer = memory.empty(like, shape, dtype)
        assert buffer.shape == torch.Size(shape)
        assert buffer.dtype == (dtype or torch.bfloat16)
        assert buffer.is_contiguous()
        assert (buffer.fill_(2) == 2).all()


def test_rows_are_summed_whatever_the_chunk(monkeypatch):
    """A buffer of one expert's rows, of some and of all: the same sums in the same order."""
    args = problem(T=31, K=3, E=6, H=16, hidden=4)
    expected = gradients(PATHS["sorted"], args)
    for chunk in (1, 2000):
        monkeypatch.setattr(sys.modules["monge.moe.compute.slot_sum"], "CHUNK", chunk)
        for a, b in zip(gradients(PATHS["sorted"], args), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads", [2, 3])
def test_experts_are_spread_over_threads(threads, dtype, monkeypatch):
    """Even loads are, in every mode of autograd, with the results of one thread; one busy expert is not."""
    spreading = sys.modules["monge.moe.compute.spreading"]
    spread = []

    def counted(work, number):
        spread.append(number)
        on_torch_threads(work, number)

    monkeypatch.setattr(precision, "_has_units", lambda dtype: False)  # one rounding, on every processor
    monkeypatch.setattr(spreading, "on_torch_threads", counted)
    monkeypatch.setattr(spreading, "torch_threads", lambda device: torch.get_num_threads())
    T, K, E = 24, 2, 8
    x, _, w, a, d, act = problem(T, K, E, H=16, hidden=4, empty=0, dtype=dtype)
    even = (torch.arange(T)[:, None] + torch.tensor([0, 3])) % E
    torch.set_num_threads(1)
    alone = gradients(PATHS["sorted"], (x, even, w, a, d, act))
    assert not spread
    torch.set_num_threads(threads)
    for ours, theirs in zip(gradients(PATHS["sorted"], (x, even, w, a, d, act)), alone):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(PATHS["sorted"](x, even, w, a, d, act), alone[0])
    with torch.inference_mode():
        torch.testing.assert_close(PATHS["sorted"](x.clone(), even, w, a, d, act), alone[0])
    assert spread == 4 * [threads]

    busy = torch.stack((torch.zeros(T, dtype=torch.int64), 1 + torch.arange(T) % (E - 1)), dim=1)
    out = PATHS["sorted"](x, busy, w, a, d, act)
    exact = formula(x.double(), busy, w.double(), a.double(), d.double(), act)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=1e-2)
    assert spread == 4 * [threads] + [2] * (threads == 2)  # half of all rows: the share of one of two threads


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name, act in ACTIVATIONS.items() if act.gated])
def test_the_compiled_gating_equals_torchs_operators(name, dtype, rows, monkeypatch):
    act, generator = ACTIVATIONS[name], torch.Generator().manual_seed(0)
    pre, grad = (torch.randn(rows, n, generator=generator, dtype=dtype) for n in (2 * 37, 37))
    weights = torch.rand(rows, 1, generator=generator, dtype=dtype)
    weights[:1], pre[-1:, 40] = 0.0, float("nan")
    compiled = act.backward(grad.clone(), weights, pre)
    monkeypatch.setattr(activations, "_compiled", lambda *_: False)
    for one, other in zip(compiled, act.backward(grad.clone(), weights, pre), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, act in ACTIVATIONS.items() if act.gated])
def test_the_compiled_gating_of_bfloat16_rounds_once(name, monkeypatch):
    """Its products and sums are float32: nearer to float64 than torch's operators, which round each."""
    act, generator = ACTIVATIONS[name], torch.Generator().manual_seed(0)
    pre, grad = (torch.randn(9, n, generator=generator).bfloat16() for n in (2 * 37, 37))
    weights = torch.rand(9, 1, generator=generator)
    exact = act.backward(grad.double(), weights.double(), pre.double())

    def errors():
        found = act.backward(grad.clone(), weights, pre)
        assert [v.dtype for v in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    compiled = errors()
    monkeypatch.setattr(activations, "_compiled", lambda *_: False)
    for ours, theirs in zip(compiled, errors(), strict=True):
        assert ours < 0.004
        assert ours <= theirs
    pre[4, 50] = float("nan")
    monkeypatch.undo()
    assert act.backward(grad.clone(), weights, pre)[0].isnan().flatten().nonzero().tolist() == [[4]]


def test_silus_gradient_far_from_zero():
    """Where its exponential leaves what float32 holds the slope is 0 or 1, as torch's in float64."""
    gates = torch.tensor([-3e38, -1000, -200, -90, -20, 0, 20, 90, 200, 1000, 3e38])
    pre = torch.stack((gates, torch.ones_like(gates)), dim=1)
    ones = torch.ones(len(gates), 1)
    found = ACTIVATIONS["swiglu"].backward(ones.clone(), ones, pre)[2][:, 0]
    exact = gates.double().requires_grad_()
    torch.nn.functional.silu(exact).sum().backward()
    torch.testing.assert_close(found.double(), exact.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [name for name in PATH_NAMES if name != "masked"])
def test_gates_of_a_wider_dtype(path):
    """Float64 gates of bfloat16 experts: summed in float64, returned in bfloat16."""
    x, indices, w, a, d, act = problem(T=24, K=2, E=5, H=40, hidden=24, dtype=torch.bfloat16)
    exact = formula(x.double(), indices, w.double(), a.double(), d.double(), act)
    with torch.no_grad():
        out = PATHS[path](x, indices, w.double(), a, d, act)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 5e-3 * exact.norm()
