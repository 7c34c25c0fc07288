"""Products of an expert's rows with rows or columns of its weights: of a few by dots, of many by panels.

A dot product reads both rows as they lie, and sums across its last vector (dot_kernels.py). In panels weights
need no such sum, and six rows meet them at a time (panel_kernels.py): with many rows that is worth the copy.

Shapes: T tokens, S slots, n rows of an expert, m rows of weights, X numbers in each, or m columns of M.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from monge.moe.compute.dot_kernels import multiply_rows
from monge.moe.compute.packing_kernels import WIDTH, empty_panel, pack_columns, pack_rows, words
from monge.moe.compute.panel_kernels import multiply_panel
from monge.moe.cpu_kernels import compiled, empty_lines

ROWS = 64
"""That meet the same weights at a time in dot products, so that both stay in the cache."""
PANEL_ROWS = 64
"""From so many rows panels are faster."""


def empty_sums(x_TX: Any, rows: int, columns: int) -> Any:
    """In compiled code: (rows, columns) for sums of products with x: float32, of float64 float64."""


@overload(empty_sums)
def _(x_TX, rows, columns):  # type: ignore[no-untyped-def]
    dtype = np.float64 if x_TX.dtype == types.float64 else np.float32
    return lambda x_TX, rows, columns: empty_lines(rows, columns, dtype)


def project(x_TX: Any, rows_n: Any, weights_mX: Any, out_nm: Any, ahead_X: Any) -> None:
    """In compiled code: ``out[n, m] = <x[rows[n]], weights[m]>``; further columns hold anything afterwards.

    ``ahead``: weights that are needed next, brought into the cache meanwhile.
    """


@overload(project)
def _(x_TX, rows_n, weights_mX, out_nm, ahead_X):  # type: ignore[no-untyped-def]
    few, numbers = _panel_rows(x_TX, weights_mX, out_nm)

    def project(x_TX, rows_n, weights_mX, out_nm, ahead_X):  # type: ignore[no-untyped-def]
        if few and len(rows_n) >= few and x_TX.shape[1] % numbers == 0:
            _multiply_panels(x_TX, rows_n, weights_mX, None, out_nm, np.arange(len(rows_n)), ahead_X)
        else:
            for n in range(0, len(rows_n), ROWS):
                multiply_rows(x_TX, rows_n[n : n + ROWS], weights_mX, out_nm[n : n + ROWS])

    return project


def add_projected(
    x_nX: Any,
    weights_mX: Any,
    gates_S: Any,
    order_n: Any,
    out_Tm: Any,
    tokens_n: Any,
    held_nm: Any,
    ahead_X: Any,
) -> None:
    """In compiled code: ``out[tokens[n], m] += gates[order[n]] <weights[m], x[n]>``."""


@overload(add_projected)
def _(x_nX, weights_mX, gates_S, order_n, out_Tm, tokens_n, held_nm, ahead_X):  # type: ignore[no-untyped-def]
    few, numbers = _panel_rows(x_nX, weights_mX, out_Tm)

    def add(x_nX, weights_mX, gates_S, order_n, out_Tm, tokens_n, held_nm, ahead_X):  # type: ignore[no-untyped-def]
        rows = len(x_nX)
        if few and rows >= few and x_nX.shape[1] % numbers == 0:
            _multiply_panels(x_nX, np.arange(rows), weights_mX, gates_S[order_n], out_Tm, tokens_n, ahead_X)
        else:
            rows_n = np.arange(ROWS)
            for begin in range(0, rows, ROWS):
                end = min(begin + ROWS, rows)
                multiply_rows(x_nX[begin:end], rows_n[: end - begin], weights_mX, held_nm)
                for n in range(begin, end):
                    out_m, held_m, gate = out_Tm[tokens_n[n]], held_nm[n - begin], gates_S[order_n[n]]
                    for h in range(len(out_m)):
                        out_m[h] += gate * held_m[h]

    return add


def _panel_rows(x_TX: Any, weights_mX: Any, out_nm: Any) -> tuple[int, int]:
    """From how many rows of such numbers on panels are used, 0 for never, and how many numbers are a word."""
    narrow, wide = types.uint16, types.float32
    kinds = x_TX.dtype, weights_mX.dtype
    fit = kinds in ((wide, wide), (wide, narrow), (narrow, narrow)) and out_nm.dtype == wide
    return PANEL_ROWS if fit else 0, 2 if x_TX.dtype == narrow else 1


@compiled
def _multiply_panels(x_TX, rows_n, weights_mX, gates_n, out_Tm, places_n, ahead_X):
    """`multiply_panel` with all rows of the weights."""
    words_TK, words_mK = words(x_TX, x_TX), words(weights_mX, x_TX)
    panel_KW = empty_panel(words_TK)
    for first in range(0, len(words_mK), WIDTH):
        pack_rows(words_mK, first, panel_KW)
        after = first + WIDTH
        next_X = weights_mX[after:] if after < len(weights_mX) else ahead_X
        multiply_panel(words_TK, rows_n, panel_KW, gates_n, out_Tm, places_n, first, next_X)


@compiled
def multiply_columns(x_nX, weights_XM, first, last, out_nm, ahead_XY):
    """``out[n, m] = sum_k x[n, k] weights[k, first + m]`` by panels; columns from ``last`` on hold anything.

    An even number of bfloat16 makes words.
    """
    words_nK, rows_n = words(x_nX, x_nX), np.arange(len(x_nX))
    panel_KW = empty_panel(words_nK)
    for column in range(first, last, WIDTH):
        pack_columns(weights_XM, column, panel_KW)
        after = column + WIDTH
        next_XY = weights_XM[:, after : after + WIDTH] if after < weights_XM.shape[1] else ahead_XY
        multiply_panel(words_nK, rows_n, panel_KW, None, out_nm, rows_n, column - first, next_XY)
