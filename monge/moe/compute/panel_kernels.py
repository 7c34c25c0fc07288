"""Products of many rows with a matrix, whose columns lie in the lanes of vectors, for numba.

The matrix is cut into panels of `WIDTH` columns. A panel is copied so that what meets one number of a row is
in one piece, and stays in the cache while six rows at a time meet it: their sums stay in registers (24
vectors of 512 bits with AVX-512, 12 of 256 without), and every step is four loads (two) and six broadcasts
for 24 products (12). A word is what fills a lane of 32 bits: a float32, or with `MULTIPLIES_BFLOAT16` two
bfloat16 that lie side by side along the summed dimension and are multiplied and added as one.

Shapes: N rows, K words of each, m columns, n rows of the output, W = `WIDTH`, X numbers = K or 2 K words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
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
    MANY_REGISTERS,
    Rows,
    add_product,
    call,
    first_lanes,
    shuffle,
    splat,
)
from monge.moe.cpu_kernels import LINE, compiled, emit_prefetch, wide

LANES, VECTORS = (16, 4) if MANY_REGISTERS else (8, 2)
ROWS = 6
WIDTH = LANES * VECTORS


def words(matrix_XY: Any, x_TX: Any) -> Any:
    """In compiled code: the bits of bfloat16 in pairs if x is bfloat16 too, other numbers as they are."""
    return matrix_XY


@overload(words)
def _(matrix_XY, x_TX):  # type: ignore[no-untyped-def]
    if x_TX.dtype == types.uint16:
        return lambda matrix_XY, x_TX: matrix_XY.view(np.uint32)
    return lambda matrix_XY, x_TX: matrix_XY


def empty_words(numbers_XY: Any, rows: Any, columns: Any) -> Any:
    """In compiled code: (rows, columns) for words of such numbers, from the beginning of a line of the cache.

    A vector that is written across two lines takes four times as long.
    """


@overload(empty_words)
def _(numbers_XY, rows, columns):  # type: ignore[no-untyped-def]
    dtype = np.float32 if numbers_XY.dtype == types.float32 else np.uint32

    def empty(numbers_XY, rows, columns):  # type: ignore[no-untyped-def]
        size = rows * columns
        memory = np.empty(size + LINE // 4, dtype)
        first = -memory.ctypes.data % LINE // 4
        return memory[first : first + size].reshape(rows, columns)

    return empty


@compiled
def empty_panel(words_TK):
    """A panel (K, W) that rows of such words can meet."""
    return empty_words(words_TK, words_TK.shape[1], WIDTH)


@compiled
def pack_rows(words_mK, first, panel_KW):
    """``panel[k, c] = words[first + c, k]``; columns beyond the last row hold anything.

    The words may be bfloat16 one by one, which become float32.
    """
    m, K = words_mK.shape
    for column in range(0, min(WIDTH, m - first), LANES):
        whole = K - K % LANES if first + column + LANES <= m else 0
        for k in range(0, whole, LANES):
            _transpose(words_mK, first + column, k, panel_KW, column)
        for k in range(whole, K):
            for c in range(column, min(column + LANES, m - first)):
                panel_KW[k, c] = wide(words_mK[first + c, k])


def pack_columns(numbers_XM: Any, first: Any, panel_KW: Any) -> None:
    """In compiled code: ``panel[k, c] = words[k, first + c]`` for a panel of any width, as by `pack_rows`.

    Here two rows of bfloat16 make words, the last of an odd number with zeros.
    """


@overload(pack_columns)
def _(numbers_XM, first, panel_KW):  # type: ignore[no-untyped-def]
    def pack(numbers_XM, first, panel_KW):  # type: ignore[no-untyped-def]
        for k in range(len(panel_KW)):
            panel_W = panel_KW[k]
            numbers_W = numbers_XM[k, first : first + len(panel_W)]
            for c in range(len(numbers_W)):
                panel_W[c] = wide(numbers_W[c])

    def pack_pairs(numbers_XM, first, panel_KW):  # type: ignore[no-untyped-def]
        for k in range(len(panel_KW)):
            panel_W = panel_KW[k]
            low_W = numbers_XM[2 * k, first : first + len(panel_W)]
            if 2 * k + 1 < len(numbers_XM):
                high_W = numbers_XM[2 * k + 1, first:]
                for c in range(len(low_W)):
                    panel_W[c] = np.uint32(low_W[c]) | np.uint32(high_W[c]) << np.uint32(16)
            else:
                for c in range(len(low_W)):
                    panel_W[c] = np.uint32(low_W[c])

    return pack_pairs if panel_KW.dtype == types.uint32 else pack


@compiled
def multiply_panel(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, first, ahead_XY):
    """``out[places[n], first + c] = <words[rows[n]], panel[:, c]>`` for all columns c that ``out`` has.

    With ``gates_n``, float32, or else None, their multiples are added to what is there. ``ahead``, which is
    needed next, is brought into the cache on the way, row by row: as much of it as a panel has words.
    """
    N = len(rows_n)
    stride = min(64, WIDTH * 4 * ROWS // max(N, 1))
    for n in range(0, N - ROWS + 1, ROWS):
        _six(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, n, first, ahead_XY, stride)
    for n in range(N - N % ROWS, N - 1, 2):
        _two(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, n, first, ahead_XY, 0)
    if N % ROWS % 2:
        _one(words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, N - 1, first, ahead_XY, 0)


def _write_transpose(typing_context, words_mK, row, place, panel_KW, column):  # type: ignore[no-untyped-def]
    """``panel[place + k, column + r] = words[row + r, place + k]`` for `LANES` of either."""

    def generate(context, builder: ir.IRBuilder, signature, args) -> Any:  # type: ignore[no-untyped-def]
        def rows_of(matrix: int, first: Any) -> Rows:
            rows = [builder.add(first, ir.Constant(I64, r)) for r in range(LANES)]
            return Rows(context, builder, signature.args[matrix], args[matrix], rows)

        source, panel = rows_of(0, args[1]), rows_of(3, args[2])
        number = FLOAT if panel.dtype == types.float32 else I32
        vectors = [source.wide(r, args[2], LANES, number) for r in range(LANES)]
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
        for k, vector in enumerate(vectors):
            builder.store(vector, panel.pointer(k, args[4], vector.type), align=4)
        return context.get_dummy_value()

    return types.void(words_mK, types.int64, types.int64, panel_KW, types.int64), generate


_transpose: Any = intrinsic(_write_transpose)


def _block(count: int) -> Any:
    """What `multiply_panel` does for ``count`` rows from n on; ``stride``: bytes to fetch for every word."""

    def write(
        typing_context, words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, n, first, ahead_XY, stride
    ):  # type: ignore[no-untyped-def]
        arguments = words_NK, rows_n, panel_KW, gates_n, out_Tm, places_n, types.int64, types.int64, ahead_XY
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
    ahead = rows_of(8, [ir.Constant(I64, 0)])
    done = builder.mul(builder.sdiv(n, ir.Constant(I64, ROWS)), x.length)  # words of rows before

    def fetch(k: Any) -> None:
        _prefetch(builder, ahead, builder.mul(builder.add(done, k), args[9]))

    sums = sums_of_products(builder, x, panel, fetch)
    gates = [splat(builder, gate, LANES) for gate in chosen(3)] if adds else []

    def write(value: Any, row: int, place: Any, mask: Any) -> None:
        pointer = out.pointer(row, place, value.type)
        if adds:
            held = _load(builder, pointer, value.type, mask)
            value = add_product(builder, held, gates[row], value)
        store(builder, value, pointer, mask)

    for_all_vectors(builder, sums, column, out.length, write)
    return context.get_dummy_value()


def for_all_vectors(
    builder: ir.IRBuilder, sums: list[list[Any]], column: Any, end: Any, write: Callable[..., None]
) -> None:
    """``write(vector, row, column, mask)`` for all, in either of two cases.

    All of these columns are before the end and the masks None, or the masks are of the lanes that are.
    """
    places = [builder.add(column, ir.Constant(I64, v * LANES)) for v in range(VECTORS)]

    def write_all(masks: list[Any]) -> None:
        for v, r in product(range(VECTORS), range(len(sums))):
            write(sums[r][v], r, places[v], masks[v])

    last = builder.add(column, ir.Constant(I64, WIDTH))
    with builder.if_else(builder.icmp_signed("<=", last, end)) as (whole, cut):
        with whole:
            write_all([None] * VECTORS)
        with cut:
            write_all([first_lanes(builder, builder.sub(end, place), LANES) for place in places])


def sums_of_products(
    builder: ir.IRBuilder, x: Rows, panel: Rows, meanwhile: Callable[[Any], None] | None = None
) -> list[list[Any]]:
    """For every row of x the vectors of its products with the panel; ``meanwhile`` comes at every word k."""
    word = FLOAT if x.dtype == types.float32 else I32
    zeros = ir.Constant(ir.VectorType(FLOAT, LANES), None)
    sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(VECTORS)] for _ in x.starts]
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    with cgutils.for_range_slice(builder, zero, x.length, one, I64) as (k, _):
        if meanwhile is not None:
            meanwhile(k)
        here = builder.mul(k, ir.Constant(I64, WIDTH))
        places = [builder.add(here, ir.Constant(I64, v * LANES)) for v in range(VECTORS)]
        columns = [panel.load(0, place, ir.VectorType(word, LANES)) for place in places]
        for r in range(len(x.starts)):
            factor = splat(builder, x.load(r, k, word), LANES)
            for total, weights in zip(sums[r], columns, strict=True):
                builder.store(add_product(builder, builder.load(total), factor, weights), total)
    return [[builder.load(total) for total in row] for row in sums]


_six, _two, _one = _block(ROWS), _block(2), _block(1)


def _prefetch(builder: ir.IRBuilder, ahead: Rows, place: Any) -> None:
    """Bring the line with that byte, counted along the rows one after the other, into the second cache."""
    length = builder.mul(ahead.length, ir.Constant(I64, ahead.bytes))
    row, within = builder.udiv(place, length), builder.urem(place, length)
    address = builder.add(builder.add(ahead.starts[0], builder.mul(row, ahead.stride)), within)
    emit_prefetch(builder, builder.inttoptr(address, I64.as_pointer()), level=2, writes=False)


def _load(builder: ir.IRBuilder, pointer: Any, vector: Any, mask: Any) -> Any:
    """The floats of the lanes in the mask, zero in others; of all lanes if it is None."""
    if mask is None:
        return builder.load(pointer, align=4)
    arguments = pointer, ir.Constant(I32, 4), mask, ir.Constant(vector, None)
    return call(builder, f"masked.load.v{LANES}f32.p0", vector, *arguments)


def store(builder: ir.IRBuilder, value: Any, pointer: Any, mask: Any) -> None:
    """The lanes in the mask, or all if it is None."""
    number = value.type.element
    bits = 32 if number == FLOAT else number.width
    if mask is None:
        builder.store(value, pointer, align=bits // 8)
    else:
        kind, align = "f32" if number == FLOAT else f"i{bits}", ir.Constant(I32, bits // 8)
        name = f"masked.store.v{LANES}{kind}.p0"
        call(builder, name, ir.VoidType(), value, pointer, align, mask)
