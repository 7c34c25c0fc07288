"""Products of a few rows with the rows of a matrix, the innermost loop of `gemv`, for numba.

A product of short rows is mostly the sum across its last vector, which compilers write anew for every pair.
Here those of sixteen pairs are folded together: two vectors of partial sums become one by two shuffles and an
addition, until every lane is the sum of one pair (docs/performance.md has what that is worth).

Shapes: n rows of x, m of the weights, X numbers in each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from monge.moe.cpu_kernels import compiled
from monge.moe.vectors import FLOAT, I32, I64, MANY_REGISTERS, NUMBERS, Rows, add_product, arguments, shuffle

BITS = 256  # of a vector; on an AMD EPYC that has them those of 512 are slower on short rows


@compiled
def multiply_rows(x_TX, rows_n, weights_mX, out_nm):
    """``out[n, m] = <x[rows[n]], weights[m]>``.

    Weights may be uint16, the bits of bfloat16, and so may x, if `MULTIPLIES_BFLOAT16`.

    Four rows of weights meet four of x, or two. They lie a quarter of the weights apart, so that the memory
    delivers four long streams: one stream at a time is a quarter slower.
    """
    N, last = len(rows_n), len(weights_mX) - 1
    quarter = (last + 4) // 4
    for m in range(quarter):  # beyond the last row it is computed, and written, once more
        four = (m, min(m + quarter, last), min(m + 2 * quarter, last), min(m + 3 * quarter, last))
        n = 0
        if MANY_REGISTERS:
            for n4 in range(0, N - 3, 4):
                rows = (rows_n[n4], rows_n[n4 + 1], rows_n[n4 + 2], rows_n[n4 + 3])
                _block(x_TX, rows, weights_mX, four, out_nm, n4)
            n = N - N % 4
        for n2 in range(n, N - 1, 2):
            _block(x_TX, (rows_n[n2], rows_n[n2 + 1]), weights_mX, four, out_nm, n2)
        if N % 2:
            _block(x_TX, (rows_n[N - 1],), weights_mX, four, out_nm, N - 1)


def _write_block(typing_context, x_TX, rows, weights_mX, columns, out_nm, first):  # type: ignore[no-untyped-def]
    """``out[first + r, columns[c]] = <x[rows[r]], weights[columns[c]]>`` for one, two or four of either."""

    def generate(context, builder: ir.IRBuilder, signature, args) -> Any:  # type: ignore[no-untyped-def]
        rows_of = arguments(context, builder, signature, args)
        x = rows_of(0, cgutils.unpack_tuple(builder, args[1]))
        streams = cgutils.unpack_tuple(builder, args[3])
        out = rows_of(4, [builder.add(args[5], ir.Constant(I64, r)) for r in range(len(x.starts))])
        weights, number = rows_of(2, streams), NUMBERS[signature.args[4].dtype]
        sums = _fold(builder, _partial_sums(builder, x, weights, number))
        for i, total in enumerate(sums):
            row, column = divmod(i, len(streams))
            builder.store(total, out.pointer(row, streams[column], total.type))
        return context.get_dummy_value()

    return types.void(x_TX, rows, weights_mX, columns, out_nm, types.int64), generate


_block: Any = intrinsic(_write_block)


def _partial_sums(builder: ir.IRBuilder, x: Rows, weights: Rows, number: Any) -> list[Any]:
    """For every pair of rows a vector whose lanes sum to its product, those of the first row of x first."""
    lanes, columns = BITS // (32 if number == FLOAT else 64), len(weights.starts)
    vector, integers = ir.VectorType(number, lanes), ir.VectorType(I32, lanes)
    zeros, zero = ir.Constant(vector, None), ir.Constant(I64, 0)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(len(x.starts) * columns)]
    pairs = x.dtype == types.uint16  # of bfloat16, two in every lane

    def add_vectors(place: Any) -> None:
        if pairs:
            add(lambda rows, r: rows.load(r, place, integers))
        else:
            add(lambda rows, r: rows.wide(r, place, lanes, number))

    def add_one(place: Any) -> None:
        def first_lane(rows: Rows, r: int) -> Any:
            alone = builder.extract_element(rows.wide(r, place, 1, number), ir.Constant(I32, 0))
            return builder.insert_element(zeros, alone, ir.Constant(I32, 0))

        add(first_lane)

    def add(load: Any) -> None:
        factors = [load(x, r) for r in range(len(x.starts))]
        for column in range(columns):
            weight = load(weights, column)
            for row, factor in enumerate(factors):
                total = sums[row * columns + column]
                builder.store(add_product(builder, builder.load(total), factor, weight), total)

    step = lanes * (2 if pairs else 1)
    rest = builder.and_(x.length, ir.Constant(I64, step - 1))
    whole = builder.sub(x.length, rest)
    with cgutils.for_range_slice(builder, zero, whole, ir.Constant(I64, step), I64) as (place, _):
        add_vectors(place)
    with cgutils.for_range_slice(builder, whole, x.length, ir.Constant(I64, 1), I64) as (place, _):
        add_one(place)
    return [builder.load(total) for total in sums]


def _fold(builder: ir.IRBuilder, vectors: list[Any]) -> list[Any]:
    """The sums of all lanes of each of 1, 2, 4, 8 ... vectors.

    A vector holds blocks of ``width`` partial sums. In each step the halves of all blocks are added, and two
    vectors become one as long as there are two.
    """
    width = vectors[0].type.count
    while width > 1:
        half, halved = width // 2, []
        pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0],)]
        for pair in pairs:
            lower = [k for k in range(len(pair) * pair[0].type.count) if k % width < half]
            upper = [k + half for k in lower]
            halved.append(builder.fadd(shuffle(builder, pair, lower), shuffle(builder, pair, upper)))
        vectors, width = halved, half
    lanes = range(vectors[0].type.count)
    return [builder.extract_element(vector, ir.Constant(I32, k)) for vector in vectors for k in lanes]
