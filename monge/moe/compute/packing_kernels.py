"""Parts of a matrix copied into panels, whose words lie as vectors meet them, for numba.

What meets one word of a row is in one piece there. A word is what fills a lane of 32 bits: a float32, or with
`MULTIPLIES_BFLOAT16` two bfloat16 that lie side by side along the summed dimension and are multiplied and
added as one.

Shapes: K words of each row or column, m columns, W = `WIDTH`, X numbers = K or 2 K words, M columns of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from monge.moe.cpu_kernels import compiled, empty_lines, wide
from monge.moe.vectors import FLOAT, I16, I32, I64, LANES, MANY_REGISTERS, arguments, shuffle

VECTORS = 4 if MANY_REGISTERS else 2
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
    """In compiled code: (rows, columns) for words of such numbers."""


@overload(empty_words)
def _(numbers_XY, rows, columns):  # type: ignore[no-untyped-def]
    dtype = np.float32 if numbers_XY.dtype == types.float32 else np.uint32
    return lambda numbers_XY, rows, columns: empty_lines(rows, columns, dtype)


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
    """In compiled code: ``panel[k, c] = words[k, first + c]`` for as many columns as the panel has.

    Those are a multiple of 2 `LANES`. Here two rows of bfloat16 make words, the last of an odd number with
    zeros.
    """


@overload(pack_columns)
def _(numbers_XM, first, panel_KW):  # type: ignore[no-untyped-def]
    def pack(numbers_XM, first, panel_KW):  # type: ignore[no-untyped-def]
        W = min(panel_KW.shape[1], numbers_XM.shape[1] - first)
        for k in range(len(panel_KW)):
            if panel_KW.shape[1] == W:
                _pack(numbers_XM, k, first, panel_KW, k)
            else:
                for c in range(W):
                    panel_KW[k, c] = wide(numbers_XM[k, first + c])

    def pack_pairs(numbers_XM, first, panel_KW):  # type: ignore[no-untyped-def]
        W = min(panel_KW.shape[1], numbers_XM.shape[1] - first)
        for k in range(len(panel_KW)):
            low, high = 2 * k, 2 * k + 1
            if panel_KW.shape[1] == W and high < len(numbers_XM):
                _pack(numbers_XM, low, first, panel_KW, k)
            else:
                for c in range(W):
                    panel_KW[k, c] = np.uint32(numbers_XM[low, first + c])
                    if high < len(numbers_XM):
                        panel_KW[k, c] |= np.uint32(numbers_XM[high, first + c]) << np.uint32(16)

    return pack_pairs if panel_KW.dtype == types.uint32 else pack


def _write_transpose(typing_context, words_mK, row, place, panel_KW, column):  # type: ignore[no-untyped-def]
    """``panel[place + k, column + r] = words[row + r, place + k]`` for `LANES` of either."""

    def generate(context, builder: ir.IRBuilder, signature, args) -> Any:  # type: ignore[no-untyped-def]
        rows_of = arguments(context, builder, signature, args)
        source, panel = (
            rows_of(index, [builder.add(first, ir.Constant(I64, r)) for r in range(LANES)])
            for index, first in ((0, args[1]), (3, args[2]))
        )
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


def _typed_pack(typing_context, numbers_XM, row, first, panel_KW, k):  # type: ignore[no-untyped-def]
    """Fill row k of a panel from the columns first.. of a row of numbers, or of two where words are pairs."""
    return types.void(numbers_XM, types.int64, types.int64, panel_KW, types.int64), _write_pack


def _write_pack(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
    _, row, first, _, k = args
    below = builder.add(row, ir.Constant(I64, 1))
    rows_of = arguments(context, builder, signature, args)
    source, panel = rows_of(0, [row, below]), rows_of(3, [k])
    zero, step = ir.Constant(I64, 0), ir.Constant(I64, 2 * LANES)
    with cgutils.for_range_slice(builder, zero, panel.length, step, I64) as (column, _):
        columns = [builder.add(column, ir.Constant(I64, half * LANES)) for half in range(2)]
        places = [builder.add(first, column) for column in columns]
        if panel.dtype == types.float32:
            vectors = [source.wide(0, place, LANES, FLOAT) for place in places]
        else:
            pair = tuple(source.load(r, places[0], ir.VectorType(I16, 2 * LANES)) for r in range(2))
            turns = [c // 2 + c % 2 * 2 * LANES for c in range(4 * LANES)]  # one of either row in turn
            halves = [shuffle(builder, pair, turns[: 2 * LANES]), shuffle(builder, pair, turns[2 * LANES :])]
            vectors = [builder.bitcast(half, ir.VectorType(I32, LANES)) for half in halves]
        for vector, place in zip(vectors, columns, strict=True):
            builder.store(vector, panel.pointer(0, place, vector.type), align=4)
    return context.get_dummy_value()


_pack: Any = intrinsic(_typed_pack)
