"""What the innermost loops are written with.

numba has no words for vectors, so innermost loops use those of its compiler: these helpers write LLVM's
instructions into a function that numba compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features

_FEATURES = getattr(config, "CPU_FEATURES", None) or get_host_cpu_features()
FAST_PRODUCTS = "+avx2" in _FEATURES
"""Whether loops of float32 products are as fast as libraries: measured with AVX2 and AVX-512."""
MANY_REGISTERS = "+avx512vl" in _FEATURES
"""Whether there are 32 vector registers, of 512 bits if asked for: else 16 of 256."""
LANES = 16 if MANY_REGISTERS else 8
"""Float32 in a vector."""
MULTIPLIES_BFLOAT16 = MANY_REGISTERS and "+avx512bf16" in _FEATURES
"""Whether the processor adds products of two bfloat16 to a float32."""
ROUNDS_TO_BFLOAT16 = MULTIPLIES_BFLOAT16 and llvm_version_info >= (22,)
"""Whether it rounds to bfloat16 in one instruction, and the compiler knows which: no older one was tried."""
I16, I32, I64, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
NUMBERS = {
    types.float32: FLOAT,
    types.float64: ir.DoubleType(),
    types.uint16: I16,  # the bits of bfloat16
    types.uint32: I32,  # of two bfloat16
}
_CONTRACT = ("contract",)  # a product and a sum may be one instruction


class Rows:
    """Some rows of a matrix whose numbers are contiguous along them."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Any, matrix: Any, rows: list[Any]) -> None:
        array = context.make_array(kind)(context, builder, matrix)
        self.stride = builder.extract_value(array.strides, 0)  # bytes
        begin = builder.ptrtoint(array.data, I64)
        self.starts = [builder.add(begin, builder.mul(row, self.stride)) for row in rows]
        self.length = builder.extract_value(array.shape, 1)
        self.builder, self.dtype, self.bytes = builder, kind.dtype, kind.dtype.bitwidth // 8

    def pointer(self, row: int, place: Any, kind: Any) -> Any:
        address = self.builder.mul(place, ir.Constant(I64, self.bytes))
        return self.builder.inttoptr(self.builder.add(self.starts[row], address), kind.as_pointer())

    def load(self, row: int, place: Any, kind: Any) -> Any:
        """What begins at ``place``: a number or a vector."""
        return self.builder.load(self.pointer(row, place, kind), align=self.bytes)

    def wide(self, row: int, place: Any, lanes: int, number: Any) -> Any:
        """The vector (of one lane, the number) that begins at ``place``, as ``number``."""
        source, builder = NUMBERS[self.dtype], self.builder
        values = self.load(row, place, ir.VectorType(source, lanes))
        if self.dtype == types.uint16:  # the upper halves of float32
            integers = ir.VectorType(I32, lanes)
            bits = builder.shl(builder.zext(values, integers), every(16, lanes, I32))
            values, source = builder.bitcast(bits, ir.VectorType(FLOAT, lanes)), FLOAT
        if source == number:
            return values
        return (builder.fptrunc if number == FLOAT else builder.fpext)(values, ir.VectorType(number, lanes))


def arguments(
    context: Any, builder: ir.IRBuilder, signature: Any, args: Any
) -> Callable[[int, list[Any]], Rows]:
    """A function that returns some rows of the intrinsic's argument with that index."""
    return lambda index, rows: Rows(context, builder, signature.args[index], args[index], rows)


class Columns(Rows):
    """Some columns of a matrix: of each ``length`` numbers, a row apart."""

    def __init__(
        self, context: Any, builder: ir.IRBuilder, kind: Any, matrix: Any, columns: list[Any]
    ) -> None:
        super().__init__(context, builder, kind, matrix, [ir.Constant(I64, 0)])
        within = [builder.mul(column, ir.Constant(I64, self.bytes)) for column in columns]
        self.starts = [builder.add(self.starts[0], place) for place in within]
        array = context.make_array(kind)(context, builder, matrix)
        self.length = builder.extract_value(array.shape, 0)

    def pointer(self, row: int, place: Any, kind: Any) -> Any:
        address = self.builder.add(self.starts[row], self.builder.mul(place, self.stride))
        return self.builder.inttoptr(address, kind.as_pointer())


class _BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def narrowed(builder: ir.IRBuilder, values: Any) -> Any:
    """Float32 rounded to the nearest bfloat16, as bits (`cpu_kernels.write`, of a vector).

    NaN stays NaN; numbers below 1.2e-38 become 0 where the processor's own instruction rounds.
    """
    lanes = values.type.count
    integers, halves = (ir.VectorType(kind, lanes) for kind in (I32, I16))
    if ROUNDS_TO_BFLOAT16 and lanes == LANES:
        return builder.bitcast(builder.fptrunc(values, ir.VectorType(_BFloat(), lanes)), halves)
    places, one, below_half = (every(number, lanes, I32) for number in (16, 1, 0x7FFF))
    bits = builder.bitcast(values, integers)
    even = builder.and_(builder.lshr(bits, places), one)
    rounded = builder.lshr(builder.add(builder.add(bits, below_half), even), places)
    missing = builder.fcmp_unordered("uno", values, values)
    return builder.select(missing, every(0x7FC0, lanes, I16), builder.trunc(rounded, halves))


def add_product(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    """``total + a b`` in every lane; a lane of integers holds two bfloat16, whose two products are added."""
    if isinstance(a.type.element, ir.IntType):
        return call(builder, f"x86.avx512bf16.dpbf16ps.{32 * a.type.count}", total.type, total, a, b)
    return builder.fadd(total, builder.fmul(a, b, flags=_CONTRACT), flags=_CONTRACT)


def every(number: float, lanes: int, kind: Any = FLOAT) -> Any:
    """The constant in every lane."""
    return ir.Constant(ir.VectorType(kind, lanes), [number] * lanes)


def exp(builder: ir.IRBuilder, x: Any) -> Any:
    """exp(x) of float32 in every lane, within four units in the last place, x at least -87.

    exp(x) = 2^n exp(r) with n whole and |r| <= ln 2 / 2, where the Taylor series to r^7 is exact to rounding.
    From n = 128 on, x above 88.4, it is infinite; also of NaN.
    """
    lanes = x.type.count
    integers = ir.VectorType(I32, lanes)
    highest, lowest = every(89.0, lanes), every(-87.0, lanes)
    x = builder.select(builder.fcmp_ordered("<", x, highest), x, highest)
    x = builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest)
    # not by adding and subtracting a large number: numba's flag that lets sums be reordered holds here too
    n = call(builder, f"nearbyint.v{lanes}f32", x.type, builder.fmul(x, every(1 / math.log(2), lanes)))
    r = x
    for part in (0.6931457519, 1.4286067653e-6):  # ln 2, and what a float32 cannot hold of it
        r = add_product(builder, r, n, every(-part, lanes))
    terms, power = [every(1 / math.factorial(k), lanes) for k in range(8)], r
    while len(terms) > 1:  # neighbours at a time, which do not wait for one another
        pairs = zip(terms[::2], terms[1::2], strict=True)
        terms = [add_product(builder, low, high, power) for low, high in pairs]
        power = builder.fmul(power, power)
    exponents = builder.add(builder.fptosi(n, integers), every(127, lanes, I32))
    scale = builder.bitcast(builder.shl(exponents, every(23, lanes, I32)), x.type)
    return builder.fmul(terms[0], scale)


def shuffle(builder: ir.IRBuilder, pair: tuple[Any, ...], lanes: list[int]) -> Any:
    """The named lanes of one vector, or of two in a row."""
    return builder.shuffle_vector(pair[0], pair[-1], ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(builder: ir.IRBuilder, number: Any, lanes: int) -> Any:
    """The number in every lane."""
    nothing = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(I32, 0))
    return shuffle(builder, (first, nothing), [0] * lanes)


def first_lanes(builder: ir.IRBuilder, count: Any, lanes: int) -> Any:
    """A mask of the lanes below ``count``, which may be more than there are, or negative."""
    numbers = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, splat(builder, count, lanes))


def call(builder: ir.IRBuilder, name: str, result: Any, *arguments: Any, flags: Sequence[str] = ()) -> Any:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}")
    return builder.call(function, arguments, fastmath=flags)
