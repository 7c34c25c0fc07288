"""Products of many rows with a matrix, whose columns lie in the lanes of vectors, for numba.

The matrix is cut into panels of `WIDTH` columns (packing_kernels.py). A panel stays in the cache while six
rows at a time meet it: their sums stay in registers (24 vectors of 512 bits with AVX-512, 12 of 256 without),
and every step is four loads (two) and six broadcasts for 24 products (12). What is needed next, of the rows
and of the matrix, is asked for meanwhile.

Shapes: N rows, K words of each, m columns, n rows of the output, W = `WIDTH`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from monge.moe.compute.packing_kernels import VECTORS, WIDTH
from monge.moe.cpu_kernels import LINE, compiled, emit_prefetch
from monge.moe.vectors import FLOAT, I32, I64, LANES, Rows, add_product, arguments, call, first_lanes, splat

ROWS = 6


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

    def chosen(index: int, places: list[Any] = numbers) -> list[Any]:
        of = array(index)
        pointers = (cgutils.get_item_pointer(context, builder, kinds[index], of, [place]) for place in places)
        return [builder.load(pointer) for pointer in pointers]

    rows_of = arguments(context, builder, signature, args)
    zero, last = ir.Constant(I64, 0), builder.sub(array(1).nitems, ir.Constant(I64, 1))
    after = [builder.add(number, ir.Constant(I64, count)) for number in numbers]
    after = [builder.select(builder.icmp_signed("<", place, last), place, last) for place in after]
    x, following, panel = rows_of(0, chosen(1)), rows_of(0, chosen(1, after)), rows_of(2, [zero])
    out, adds = rows_of(4, chosen(5)), kinds[3] != types.none
    ahead = rows_of(8, [zero])
    done = builder.mul(builder.sdiv(n, ir.Constant(I64, ROWS)), x.length)  # words of rows before

    def fetch(k: Any) -> None:
        _prefetch(builder, ahead, builder.mul(builder.add(done, k), args[9]))
        begins_line = builder.icmp_unsigned("==", builder.and_(k, ir.Constant(I64, LINE // 4 - 1)), zero)
        with builder.if_then(begins_line):
            for r in range(count):
                emit_prefetch(builder, following.pointer(r, k, I64), level=2, writes=False)

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
