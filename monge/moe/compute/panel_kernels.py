"""Products of many rows with a matrix, whose columns lie in the lanes of vectors, for numba.

The matrix is cut into panels of `WIDTH` columns. A panel is copied so that what meets one number of a row is
in one piece, and stays in the cache while six rows at a time meet it: 24 vectors of sums stay in registers,
and every step is four loads and six broadcasts for 24 products. A word is what fills a lane of 32 bits: a
float32, or two bfloat16 that lie side by side along the summed dimension and are multiplied and added as one.

Written for 512 bits and 32 registers (`MANY_REGISTERS`), bfloat16 for `MULTIPLIES_BFLOAT16`.

Shapes: N rows, K words of each, m columns, n rows of the output, W = `WIDTH`, X numbers = K or 2 K words.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from monge.moe.compute.vectors import (
    FLOAT,
    I32,
    I64,
    Rows,
    add_product,
    call,
    first_lanes,
    shuffle,
    splat,
)
from monge.moe.cpu_kernels import compiled

LANES, VECTORS, ROWS = 16, 4, 6
WIDTH = LANES * VECTORS


def words(matrix_XY: Any) -> Any:
    """In compiled code: float32 as they are, the bits of bfloat16 in pairs, of which a row has whole ones."""
    return matrix_XY


@overload(words)
def _(matrix_XY):  # type: ignore[no-untyped-def]
    if matrix_XY.dtype == types.uint16:
        return lambda matrix_XY: matrix_XY.view(np.uint32)
    return lambda matrix_XY: matrix_XY


def empty_panel(matrix_XY: Any, K: int) -> Any:
    """In compiled code: a panel (K or a little more, W) of words of the matrix."""


@overload(empty_panel)
def _(matrix_XY, K):  # type: ignore[no-untyped-def]
    dtype = np.float32 if matrix_XY.dtype == types.float32 else np.uint32
    return lambda matrix_XY, K: np.empty(((K + LANES - 1) // LANES * LANES, WIDTH), dtype)


@compiled
def pack_rows(words_mK, first, panel_KW):
    """``panel[k, c] = words[first + c, k]``; columns beyond the last row are copies of it."""
    for column in range(0, WIDTH, LANES):
        for k in range(0, words_mK.shape[1], LANES):
            _transpose(words_mK, first + column, k, panel_KW, column)


@compiled
def multiply_panel(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, first, ahead_X):
    """``out[places[n], first + c] = <words[rows[n]], panel[:, c]>`` for all columns c that ``out`` has.

    With ``gates_n``, float32, or else None, their multiples are added to what is there. ``ahead``, which is
    needed next, is brought into the cache on the way: as much of it as a panel has words.
    """
    N = len(rows_n)
    stride = min(64, WIDTH * 4 * ROWS // max(N, 1))
    for n in range(0, N - ROWS + 1, ROWS):
        _six(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, n, first, ahead_X, stride)
    for n in range(N - N % ROWS, N - 1, 2):
        _two(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, n, first, ahead_X, 0)
    if N % ROWS % 2:
        _one(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, N - 1, first, ahead_X, 0)


def _write_transpose(typing_context, words_mK, row, place, panel_KW, column):  # type: ignore[no-untyped-def]
    """``panel[place + k, column + r] = words[row + r, place + k]`` for `LANES` of either."""

    def generate(context, builder: ir.IRBuilder, signature, args) -> Any:  # type: ignore[no-untyped-def]
        integers = ir.VectorType(I32, LANES)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        last = builder.sub(builder.extract_value(array.shape, 0), ir.Constant(I64, 1))
        rows = []
        for r in range(LANES):
            beyond = builder.add(args[1], ir.Constant(I64, r))
            rows.append(builder.select(builder.icmp_signed("<", beyond, last), beyond, last))
        source = Rows(context, builder, signature.args[0], args[0], rows)
        mask = first_lanes(builder, builder.sub(source.length, args[2]), LANES)
        vectors = []
        for r in range(LANES):
            pointer = source.pointer(r, args[2], integers)
            vectors.append(_masked_load(builder, pointer, integers, mask))
        distance = LANES // 2
        while distance:  # swap the blocks off the diagonal, of half the size each time
            lower = [k if not k & distance else k - distance + LANES for k in range(LANES)]
            upper = [k + distance if not k & distance else k + LANES for k in range(LANES)]
            for r in range(LANES):
                if not r & distance:
                    pair = vectors[r], vectors[r + distance]
                    vectors[r] = shuffle(builder, pair, lower)
                    vectors[r + distance] = shuffle(builder, pair, upper)
            distance //= 2
        places = [builder.add(args[2], ir.Constant(I64, k)) for k in range(LANES)]
        panel = Rows(context, builder, signature.args[3], args[3], places)
        for k, vector in enumerate(vectors):
            builder.store(vector, panel.pointer(k, args[4], integers), align=4)
        return context.get_dummy_value()

    return types.void(words_mK, types.int64, types.int64, panel_KW, types.int64), generate


_transpose: Any = intrinsic(_write_transpose)


def _block(count: int) -> Any:
    """What `multiply_panel` does for ``count`` rows from n on; ``stride``: bytes to fetch for every word."""

    def write(
        typing_context, words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, n, first, ahead_X, stride
    ):  # type: ignore[no-untyped-def]
        arguments = words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, types.int64, types.int64, ahead_X
        return types.void(*arguments, types.int64), partial(_write_block, count)

    return intrinsic(write)


def _write_block(count: int, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    kinds, (n, column) = signature.args, args[6:8]
    numbers = [builder.add(n, ir.Constant(I64, r)) for r in range(count)]

    def array(index: int) -> Any:
        return context.make_array(kinds[index])(context, builder, args[index])

    def chosen(index: int) -> list[Any]:
        of = array(index)
        return [
            builder.load(cgutils.get_item_pointer(context, builder, kinds[index], of, [r])) for r in numbers
        ]

    def rows_of(index: int, rows: list[Any]) -> Rows:
        return Rows(context, builder, kinds[index], args[index], rows)

    x, panel = rows_of(0, chosen(1)), rows_of(2, [ir.Constant(I64, 0)])
    out, adds = rows_of(4, chosen(5)), kinds[3] != types.none
    sums = _sums(builder, x, panel, ahead=builder.ptrtoint(array(8).data, I64), first=n, stride=args[9])
    gates = [splat(builder, gate, LANES) for gate in chosen(3)] if adds else []
    for v in range(VECTORS):
        place = builder.add(column, ir.Constant(I64, v * LANES))
        mask = first_lanes(builder, builder.sub(out.length, place), LANES)
        for r in range(count):
            value = sums[r][v]
            pointer = out.pointer(r, place, value.type)
            if adds:
                before = _masked_load(builder, pointer, value.type, mask)
                value = add_product(builder, before, gates[r], value)
            align = ir.Constant(I32, 4)
            call(builder, f"masked.store.v{LANES}f32.p0", ir.VoidType(), value, pointer, align, mask)
    return context.get_dummy_value()


def _sums(
    builder: ir.IRBuilder, x: Rows, panel: Rows, ahead: Any, first: Any, stride: Any
) -> list[list[Any]]:
    """For every row of x the vectors of its products with all columns of the panel."""
    word = FLOAT if x.dtype == types.float32 else I32
    zeros = ir.Constant(ir.VectorType(FLOAT, LANES), None)
    sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(VECTORS)] for _ in x.starts]
    done = builder.mul(builder.sdiv(first, ir.Constant(I64, ROWS)), x.length)  # words of rows before
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    with cgutils.for_range_slice(builder, zero, x.length, one, I64) as (k, _):
        _prefetch(builder, builder.add(ahead, builder.mul(builder.add(done, k), stride)))
        here = builder.mul(k, ir.Constant(I64, WIDTH))
        places = [builder.add(here, ir.Constant(I64, v * LANES)) for v in range(VECTORS)]
        columns = [panel.load(0, place, ir.VectorType(word, LANES)) for place in places]
        for r in range(len(x.starts)):
            factor = splat(builder, x.load(r, k, word), LANES)
            for total, weights in zip(sums[r], columns, strict=True):
                builder.store(add_product(builder, builder.load(total), factor, weights), total)
    return [[builder.load(total) for total in row] for row in sums]


_six, _two, _one = _block(ROWS), _block(2), _block(1)


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Bring a line of memory into the second cache."""
    hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # read, keep in the second cache, data
    call(builder, "prefetch.p0", ir.VoidType(), builder.inttoptr(address, I64.as_pointer()), *hints)


def _masked_load(builder: ir.IRBuilder, pointer: Any, vector: Any, mask: Any) -> Any:
    """What is there, zeros in the other lanes."""
    kind = "f32" if vector.element == FLOAT else "i32"
    arguments = pointer, ir.Constant(I32, 4), mask, ir.Constant(vector, None)
    return call(builder, f"masked.load.v{LANES}{kind}.p0", vector, *arguments)
