"""Compiled loops around the experts' products, for the CPU: the slots' sort and the sum of their outputs.

Shapes: T tokens, n rows, R rows of sorted slots, K slots per token, E experts, H model width; expert e has
the rows starts[e]..starts[e + 1] - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

# sums may be reordered into vectors; NaN and infinity keep their meaning
compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def as_array(x: Tensor) -> np.ndarray:
    """The same memory for numpy, which has no bfloat16: its bits.

    Not by ``Tensor.numpy``, which forbids to resize the storage ever after: FSDP frees gathered weights so.
    """
    x = x.detach()
    return np.from_dlpack(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x)


def wide(x: Any) -> Any:
    """In compiled code: uint16, the bits of a bfloat16, as float32; other numbers as they are."""
    return x


@overload(wide, inline="always")
def _(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def write(values_X: Any, place: int, value: Any) -> None:
    """In compiled code: ``values[place] = value``, rounded to bfloat16 where those are uint16, its bits."""
    values_X[place] = value


@overload(write)
def _(values_X, place, value):  # type: ignore[no-untyped-def]
    def write_plain(values_X, place, value):  # type: ignore[no-untyped-def]
        values_X[place] = value

    def write_rounded(values_X, place, value):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
        values_X[place] = np.uint16(rounded) if value == value else np.uint16(0x7FC0)  # NaN stays

    return write_rounded if isinstance(values_X.dtype, types.Integer) else write_plain


LINE = 64
"""Bytes that come from memory at a time."""
AHEAD = 8
"""Rows: memory of the row that is so many further on is asked for, since a part of a row is over too soon."""


def emit_prefetch(builder: ir.IRBuilder, address: Any, *, level: int, writes: bool) -> None:
    """Write the instruction that brings a line into the cache of that level, if so to be written to."""
    I32, bytes_ = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [bytes_, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    address = builder.bitcast(address, bytes_)
    builder.call(function, [address, *(ir.Constant(I32, hint) for hint in (int(writes), 4 - level, 1))])


def _prefetch_line(typing_context, values_NX, n, x):  # type: ignore[no-untyped-def]
    def generate(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, kind, array, args[1:])
        emit_prefetch(builder, place, level=1, writes=True)
        return context.get_dummy_value()

    return types.void(values_NX, types.int64, types.int64), generate


_fetch: Any = intrinsic(_prefetch_line)


@compiled
def empty_lines(rows, columns, dtype):
    """``np.empty((rows, columns), dtype)`` from the beginning of a line.

    A vector that is written across two lines takes four times as long.
    """
    memory = np.empty(rows * columns + LINE, dtype)
    first = -memory.ctypes.data % LINE // memory.itemsize
    return memory[first : first + rows * columns].reshape(rows, columns)


@compiled
def prefetch(values_NX, n, first, last):
    """Bring ``values[n, first:last]`` into the cache, to be read or written to soon, if there is that row."""
    if n < len(values_NX):
        for x in range(first, last, LINE // values_NX.itemsize):
            _fetch(values_NX, n, x)


@compiled
def add_rows(values_nH, tokens_n, gates_n, first, last, out_TH):
    """``out[tokens[n], h] += gates[n] * values[n, h]`` for h in first..last-1, the rows n in their order."""
    for n in range(values_nH.shape[0]):
        gate = gates_n[n]
        out_H, values_H = out_TH[tokens_n[n], first:last], values_nH[n, first:last]
        for h in range(last - first):
            out_H[h] += gate * values_H[h]


@compiled
def sort_by_expert(experts_TK, num_experts, padded):
    """A stable counting sort of the flat slots by expert; empty ones (-1) last if ``padded``, else left out.

    Returns ``starts`` (E + 1,), the token and the slot of each of the R rows, and the row of every slot
    (T, K), which is R for an empty one.
    """
    T, K = experts_TK.shape
    place_E1 = np.zeros(num_experts + 1, np.int64)
    for t in range(T):
        for k in range(K):
            e = experts_TK[t, k]
            if e >= num_experts:
                raise IndexError("an expert's index is not below the number of experts")
            if e >= 0:
                place_E1[e + 1] += 1
    for e in range(num_experts):
        place_E1[e + 1] += place_E1[e]
    starts_E1 = place_E1.copy()
    empty = place_E1[-1]
    R = T * K if padded else empty
    tokens_R, order_R = np.empty(R, np.int64), np.empty(R, np.int64)
    rows_TK = np.full((T, K), R)
    for t in range(T):
        for k in range(K):
            e = experts_TK[t, k]
            row = empty
            if e >= 0:
                row = place_E1[e]
                place_E1[e] += 1
                rows_TK[t, k] = row
            else:
                empty += 1
            if row < R:
                tokens_R[row] = t
                order_R[row] = t * K + k
    return starts_E1, tokens_R, order_R, rows_TK
