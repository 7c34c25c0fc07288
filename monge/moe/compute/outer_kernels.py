"""The product of two matrices along their rows, ``a^T b``: what the gradients of weights are, for numba.

Columns of both are copied into panels. Words of b fill the lanes of vectors, words of a are spread over them
(panel_kernels.py), and the memory that sums are written to is asked for while the sums before are made.

Shapes: n rows, K words of each column, a (n, X), b (n, Y), W = `WIDTH`, L = `LEFT`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from monge.moe.compute.packing_kernels import WIDTH, empty_words, pack_columns
from monge.moe.compute.panel_kernels import ROWS, for_all_vectors, store, sums_of_products
from monge.moe.cpu_kernels import LINE, compiled, emit_prefetch
from monge.moe.vectors import FLOAT, I64, Columns, Rows, narrowed

LEFT = 16 * ROWS
"""Columns of a in a panel."""


@compiled
def multiply_outer(a_nX, b_nY, begin, end, out_XY):
    """``out[x, y] = sum_n a[n, x] b[n, y]`` for x in begin..end-1.

    All of one dtype: float32, or the bits of bfloat16.
    """
    Y = out_XY.shape[1]
    panels, K = (Y + WIDTH - 1) // WIDTH, _words_of(a_nX)
    right, left_KL = empty_words(b_nY, panels * K, WIDTH), empty_words(a_nX, K, LEFT)
    for panel in range(panels):
        pack_columns(b_nY, panel * WIDTH, right[panel * K : (panel + 1) * K])
    for first in range(begin, end, LEFT):
        pack_columns(a_nX, first, left_KL)
        count = min(LEFT, end - first)
        sixes, twos = count - count % ROWS, count - count % 2
        for panel in range(panels):
            right_KW, column = right[panel * K : (panel + 1) * K], panel * WIDTH
            for x in range(0, sixes, ROWS):
                _six(left_KL, x, right_KW, out_XY, first + x, column)
            for x in range(sixes, twos, 2):
                _two(left_KL, x, right_KW, out_XY, first + x, column)
            if twos < count:
                _one(left_KL, twos, right_KW, out_XY, first + twos, column)


def _words_of(x_nX: Any) -> Any:
    """In compiled code: how many words the numbers of a column make."""


@overload(_words_of)
def _(x_nX):  # type: ignore[no-untyped-def]
    if x_nX.dtype == types.uint16:
        return lambda x_nX: (len(x_nX) + 1) // 2
    return lambda x_nX: len(x_nX)


def _block(count: int) -> Any:
    """What `multiply_outer` does for ``count`` rows of ``out`` and the columns of a panel."""

    def write(typing_context, left_KL, x, right_KW, out_XY, row, column):  # type: ignore[no-untyped-def]
        arguments = left_KL, types.int64, right_KW, out_XY, types.int64, types.int64
        return types.void(*arguments), partial(_write_block, count)

    return intrinsic(write)


def _write_block(count: int, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    kinds, (left, x, right, out_XY, row, column) = signature.args, args

    def numbers(first: Any) -> list[Any]:
        return [builder.add(first, ir.Constant(I64, r)) for r in range(count)]

    left = Columns(context, builder, kinds[0], left, numbers(x))
    right = Rows(context, builder, kinds[2], right, [ir.Constant(I64, 0)])
    out = Rows(context, builder, kinds[3], out_XY, numbers(row))
    later = Rows(context, builder, kinds[3], out_XY, numbers(builder.add(row, ir.Constant(I64, count))))
    for r in range(count):
        for place in range(0, WIDTH, LINE // out.bytes):
            line = later.pointer(r, builder.add(column, ir.Constant(I64, place)), FLOAT)
            emit_prefetch(builder, line, level=1, writes=True)
    sums = sums_of_products(builder, left, right)

    def write(value: Any, r: int, place: Any, mask: Any) -> None:
        value = value if out.dtype == types.float32 else narrowed(builder, value)
        store(builder, value, out.pointer(r, place, value.type), mask)

    for_all_vectors(builder, sums, column, out.length, write)
    return context.get_dummy_value()


_six, _two, _one = _block(ROWS), _block(2), _block(1)
