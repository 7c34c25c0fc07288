"""Products of a few rows with the rows of a matrix, the innermost loop of `gemv`, for numba.

A product of short rows is mostly the sum across its last vector, which compilers write anew for every pair.
Here those of sixteen pairs are folded together: two vectors of partial sums become one by two shuffles and an
addition, until every lane is the sum of one pair (docs/performance.md has what that is worth). numba has no
words for vectors, so `_block` is written in those of its compiler.

Shapes: n rows of x, m of the weights, X numbers in each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from monge.moe.cpu_kernels import compiled

BITS = 256  # of a vector; on an AMD EPYC that has them those of 512 are slower on short rows
_FEATURES = getattr(config, "CPU_FEATURES", None) or get_host_cpu_features()
MANY_REGISTERS = "+avx512vl" in _FEATURES
"""Whether there are 32 vector registers: sixteen sums and their factors stay in them, else eight do."""
MULTIPLIES_BFLOAT16 = MANY_REGISTERS and "+avx512bf16" in _FEATURES
"""Whether the processor adds products of two bfloat16 to a float32: x may be bfloat16 too."""
_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_NUMBERS = {types.float32: _FLOAT, types.float64: ir.DoubleType(), types.uint16: ir.IntType(16)}
_CONTRACT = ("contract",)  # a product and a sum may be one instruction


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
        def rows_of(matrix: int, indices: list[Any]) -> _Rows:
            array = context.make_array(signature.args[matrix])(context, builder, args[matrix])
            return _Rows(builder, array, signature.args[matrix].dtype, indices)

        count, element = len(signature.args[1]), builder.extract_value
        x = rows_of(0, [element(args[1], r) for r in range(count)])
        streams = [element(args[3], c) for c in range(len(signature.args[3]))]
        out = rows_of(4, [builder.add(args[5], ir.Constant(_I64, r)) for r in range(count)])
        weights, number = rows_of(2, streams), _NUMBERS[signature.args[4].dtype]
        sums = _fold(builder, _partial_sums(builder, x, weights, number))
        for i, total in enumerate(sums):
            row, column = divmod(i, len(streams))
            builder.store(total, out.pointer(row, streams[column], total.type))
        return context.get_dummy_value()

    return types.void(x_TX, rows, weights_mX, columns, out_nm, types.int64), generate


_block: Any = intrinsic(_write_block)


class _Rows:
    """Some rows of a matrix whose numbers are contiguous along them."""

    def __init__(self, builder: ir.IRBuilder, array: Any, dtype: Any, indices: list[Any]) -> None:
        stride = builder.extract_value(array.strides, 0)
        begin = builder.ptrtoint(array.data, _I64)
        self.starts = [builder.add(begin, builder.mul(index, stride)) for index in indices]
        self.length = builder.extract_value(array.shape, 1)
        self.builder, self.dtype, self.bytes = builder, dtype, dtype.bitwidth // 8

    def pointer(self, row: int, place: Any, kind: Any) -> Any:
        address = self.builder.mul(place, ir.Constant(_I64, self.bytes))
        return self.builder.inttoptr(self.builder.add(self.starts[row], address), kind.as_pointer())

    def load(self, row: int, place: Any, kind: Any) -> Any:
        """What begins at ``place``: a number or a vector."""
        return self.builder.load(self.pointer(row, place, kind), align=self.bytes)

    def wide(self, row: int, place: Any, lanes: int, number: Any) -> Any:
        """The vector (of one lane, the number) that begins at ``place``, as ``number``."""
        source, builder = _NUMBERS[self.dtype], self.builder
        values = self.load(row, place, ir.VectorType(source, lanes))
        if self.dtype == types.uint16:  # the upper halves of float32
            integers = ir.VectorType(_I32, lanes)
            bits = builder.shl(builder.zext(values, integers), ir.Constant(integers, [16] * lanes))
            values, source = builder.bitcast(bits, ir.VectorType(_FLOAT, lanes)), _FLOAT
        if source == number:
            return values
        return (builder.fptrunc if number == _FLOAT else builder.fpext)(values, ir.VectorType(number, lanes))


def _partial_sums(builder: ir.IRBuilder, x: _Rows, weights: _Rows, number: Any) -> list[Any]:
    """For every pair of rows a vector whose lanes sum to its product, those of the first row of x first."""
    lanes, columns = BITS // (32 if number == _FLOAT else 64), len(weights.starts)
    vector, integers = ir.VectorType(number, lanes), ir.VectorType(_I32, lanes)
    zeros, zero = ir.Constant(vector, None), ir.Constant(_I64, 0)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(len(x.starts) * columns)]
    pairs = x.dtype == types.uint16  # of bfloat16, two in every lane
    dot = ir.FunctionType(vector, [vector, integers, integers])

    def add_vectors(place: Any) -> None:
        if pairs:
            function = cgutils.get_or_insert_function(
                builder.module, dot, f"llvm.x86.avx512bf16.dpbf16ps.{BITS}"
            )
            add(lambda rows, r: rows.load(r, place, integers), lambda *args: builder.call(function, args))
        else:
            add(lambda rows, r: rows.wide(r, place, lanes, number), fused)

    def add_one(place: Any) -> None:
        def first_lane(rows: _Rows, r: int) -> Any:
            alone = builder.extract_element(rows.wide(r, place, 1, number), ir.Constant(_I32, 0))
            return builder.insert_element(zeros, alone, ir.Constant(_I32, 0))

        add(first_lane, fused)

    def fused(total: Any, factor: Any, weight: Any) -> Any:
        product = builder.fmul(factor, weight, flags=_CONTRACT)
        return builder.fadd(total, product, flags=_CONTRACT)

    def add(load: Any, multiply: Any) -> None:
        factors = [load(x, r) for r in range(len(x.starts))]
        for column in range(columns):
            weight = load(weights, column)
            for row, factor in enumerate(factors):
                total = sums[row * columns + column]
                builder.store(multiply(builder.load(total), factor, weight), total)

    step = lanes * (2 if pairs else 1)
    rest = builder.and_(x.length, ir.Constant(_I64, step - 1))
    whole = builder.sub(x.length, rest)
    with cgutils.for_range_slice(builder, zero, whole, ir.Constant(_I64, step), _I64) as (place, _):
        add_vectors(place)
    with cgutils.for_range_slice(builder, whole, x.length, ir.Constant(_I64, 1), _I64) as (place, _):
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
            halved.append(builder.fadd(_shuffle(builder, pair, lower), _shuffle(builder, pair, upper)))
        vectors, width = halved, half
    lanes = range(vectors[0].type.count)
    return [builder.extract_element(vector, ir.Constant(_I32, k)) for vector in vectors for k in lanes]


def _shuffle(builder: ir.IRBuilder, pair: tuple[Any, ...], lanes: list[int]) -> Any:
    """The named lanes of one vector, or of two in a row."""
    return builder.shuffle_vector(pair[0], pair[-1], ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))
