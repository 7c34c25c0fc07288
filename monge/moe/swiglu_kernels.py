"""SwiGLU in vectors, forward and backward, for numba: ``silu(gate) up`` with silu(x) = x sigmoid(x).

In a loop of so many arrays its compiler finds no vectors, and several loops of few arrays each take twice as
long on the short rows of an item. So a row of neurons is written out in one pass: float32, or bfloat16 as
bits, with sums in float32. Float64, which nobody trains with, takes a plain loop.

Shapes: n rows of an expert, I its neurons, m those at work, J = 2 I.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from monge.moe.cpu_kernels import AHEAD, emit_prefetch, wide, write
from monge.moe.vectors import (
    FLOAT,
    I32,
    I64,
    LANES,
    Rows,
    add_product,
    arguments,
    call,
    every,
    exp,
    narrowed,
    splat,
)


def swiglu(gate_nm: Any, up_nm: Any, n: int, first: int, count: int, act_nI: Any, pre_nJ: Any) -> None:
    """In compiled code: ``act[n, first + m] = silu(gate[n, m]) up[n, m]`` for m below ``count``.

    Gate and up are kept in ``pre``, unless it has no rows.
    """


@overload(swiglu)
def _(gate_nm, up_nm, n, first, count, act_nI, pre_nJ):  # type: ignore[no-untyped-def]
    def plain(gate_nm, up_nm, n, first, count, act_nI, pre_nJ):  # type: ignore[no-untyped-def]
        for m in range(count):
            gate, up, i = gate_nm[n, m], up_nm[n, m], first + m
            if len(pre_nJ):
                write(pre_nJ[n], i, gate)
                write(pre_nJ[n], act_nI.shape[1] + i, up)
            write(act_nI[n], i, gate / (1 + math.exp(-gate)) * up)

    def vectors(gate_nm, up_nm, n, first, count, act_nI, pre_nJ):  # type: ignore[no-untyped-def]
        if len(pre_nJ):
            _forward(gate_nm, up_nm, n, first, count, act_nI, pre_nJ)
        else:
            _forward(gate_nm, up_nm, n, first, count, act_nI, None)

    return vectors if gate_nm.dtype == types.float32 else plain


def swiglu_gradients(
    weight: float, pre_nJ: Any, grad_nm: Any, n: int, first: int, count: int, act_nI: Any, grad_pre_nJ: Any
) -> Any:
    """In compiled code: row n of `activation_kernels.swiglu_backward`; returns the gradient of its weight."""


@overload(swiglu_gradients)
def _(weight, pre_nJ, grad_nm, n, first, count, act_nI, grad_pre_nJ):  # type: ignore[no-untyped-def]
    def plain(weight, pre_nJ, grad_nm, n, first, count, act_nI, grad_pre_nJ):  # type: ignore[no-untyped-def]
        total, I = weight * 0, act_nI.shape[1]
        for m in range(count):
            i = first + m
            gate, up, grad = wide(pre_nJ[n, i]), wide(pre_nJ[n, I + i]), wide(grad_nm[n, m])
            sigmoid = 1 / (1 + math.exp(-gate))
            silu = gate * sigmoid
            total += grad * silu * up
            write(act_nI[n], i, weight * silu * up)
            write(grad_pre_nJ[n], i, weight * grad * up * (sigmoid + silu * (1 - sigmoid)))
            write(grad_pre_nJ[n], I + i, weight * grad * silu)
        return total

    def vectors(weight, pre_nJ, grad_nm, n, first, count, act_nI, grad_pre_nJ):  # type: ignore[no-untyped-def]
        return _backward(weight, pre_nJ, grad_nm, n, first, count, act_nI, grad_pre_nJ)

    return vectors if weight == types.float32 else plain


def _typed_forward(typing_context, gate_nm, up_nm, n, first, count, act_nI, pre_nJ):  # type: ignore[no-untyped-def]
    numbers = types.int64, types.int64, types.int64
    return types.void(gate_nm, up_nm, *numbers, act_nI, pre_nJ), _write_forward


def _write_forward(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    rows_of = arguments(context, builder, signature, args)
    n, first, count = args[2:5]
    later = builder.add(n, ir.Constant(I64, AHEAD))
    gate, up, act = (rows_of(index, [n]) for index in (0, 1, 5))
    later_act = rows_of(5, [later])
    kept = [rows_of(6, [row]) for row in (n, later)] if signature.args[6] != types.none else []

    def step(m: Any, lanes: int) -> None:
        here = builder.add(first, m)
        there = builder.add(here, act.length)
        gates, ups = (rows.wide(0, m, lanes, FLOAT) for rows in (gate, up))
        _ask_for(builder, later_act, here)
        if kept:
            pre, later_pre = kept
            for values, place in ((gates, here), (ups, there)):
                _ask_for(builder, later_pre, place)
                _write(builder, values, pre, place)
        _write(builder, builder.fmul(builder.fmul(gates, _sigmoid(builder, gates)), ups), act, here)

    _in_vectors(builder, count, step)
    return context.get_dummy_value()


def _typed_backward(typing_context, weight, pre_nJ, grad_nm, n, first, count, act_nI, grad_pre_nJ):  # type: ignore[no-untyped-def]
    numbers = types.int64, types.int64, types.int64
    return types.float32(weight, pre_nJ, grad_nm, *numbers, act_nI, grad_pre_nJ), _write_backward


def _write_backward(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    rows_of = arguments(context, builder, signature, args)
    n, first, count = args[3:6]
    pre, grad, act, grad_pre = (rows_of(index, [n]) for index in (1, 2, 6, 7))
    later = builder.add(n, ir.Constant(I64, AHEAD))
    later_pre, later_act, later_grad_pre = (rows_of(index, [later]) for index in (1, 6, 7))
    totals = {lanes: cgutils.alloca_once_value(builder, every(0.0, lanes)) for lanes in (LANES, 1)}

    def step(m: Any, lanes: int) -> None:
        here = builder.add(first, m)
        there = builder.add(here, act.length)
        _ask_for(builder, later_act, here)
        for place in (here, there):
            _ask_for(builder, later_pre, place)
            _ask_for(builder, later_grad_pre, place)
        gate, up = (pre.wide(0, place, lanes, FLOAT) for place in (here, there))
        grads, weights = grad.wide(0, m, lanes, FLOAT), splat(builder, args[0], lanes)
        sigmoid = _sigmoid(builder, gate)
        silu, weighted = builder.fmul(gate, sigmoid), builder.fmul(weights, up)
        slope = add_product(builder, sigmoid, silu, builder.fsub(every(1.0, lanes), sigmoid))
        product = builder.fmul(grads, silu)
        builder.store(add_product(builder, builder.load(totals[lanes]), product, up), totals[lanes])
        _write(builder, builder.fmul(weights, product), grad_pre, there)
        _write(builder, builder.fmul(weighted, silu), act, here)
        _write(builder, builder.fmul(builder.fmul(weighted, grads), slope), grad_pre, here)

    _in_vectors(builder, count, step)
    single = builder.extract_element(builder.load(totals[1]), ir.Constant(I32, 0))
    name = f"vector.reduce.fadd.v{LANES}f32"
    return call(builder, name, FLOAT, single, builder.load(totals[LANES]), flags=("reassoc",))


_forward: Any = intrinsic(_typed_forward)
_backward: Any = intrinsic(_typed_backward)


def _sigmoid(builder: ir.IRBuilder, x: Any) -> Any:
    one = every(1.0, x.type.count)
    return builder.fdiv(one, builder.fadd(one, exp(builder, builder.fneg(x))))


def _in_vectors(builder: ir.IRBuilder, count: Any, step: Callable[[Any, int], None]) -> None:
    """``step(place, lanes)`` for all places below ``count``: whole vectors, then one by one."""
    whole = builder.and_(count, ir.Constant(I64, -LANES))
    for begin, end, lanes in ((ir.Constant(I64, 0), whole, LANES), (whole, count, 1)):
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(I64, lanes), I64) as (place, _):
            step(place, lanes)


def _ask_for(builder: ir.IRBuilder, rows: Rows, place: Any) -> None:
    emit_prefetch(builder, rows.pointer(0, place, FLOAT), level=1, writes=True)


def _write(builder: ir.IRBuilder, values: Any, rows: Rows, place: Any) -> None:
    """Rounded to bfloat16 where those are uint16."""
    values = values if rows.dtype == types.float32 else narrowed(builder, values)
    builder.store(values, rows.pointer(0, place, values.type), align=rows.bytes)
