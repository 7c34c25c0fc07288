"""Sum the rows that experts return, one expert after the other, into the tokens they belong to.

On the CPU the rows go through a buffer that stays in the cache and is added up whenever it is full: writing
all of them first and summing afterwards costs as much as several matrix products, most of it for new memory.
The order of a token's sum is that of its experts' numbers. On an accelerator all rows are kept and one kernel
sums them in slot order: adding up in place would take atomic operations, whose order is not fixed.

Shapes: T tokens, K slots per token, H width, R rows (see dispatch.Slots), n rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from monge.moe.compute.memory import empty, scratch
from monge.moe.cpu_kernels import add_rows
from monge.moe.dispatch import Slots, combine
from monge.ot.threads import run_all, split

CHUNK = 8 * 2**20  # bytes of rows of each thread that are held before they are added up
MOST = 64 * 2**20  # of all threads
ALONE = 2**16  # elements that one thread adds faster than it wakes another


class SlotSum:
    """``out_t = sum over the rows r of token t of weights_r * values_r``, rows in ascending order.

    Args:
        slots: the sorted slots.
        like_TH: gives T, H and the device.
        dtype: of values and sum.
        weights_TK: the gates; None means 1.
        owner: the weight as long as which the memory of the buffer is kept for other sums; None keeps none.
    """

    def __init__(
        self,
        slots: Slots,
        like_TH: Tensor,
        dtype: torch.dtype,
        weights_TK: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> None:
        R, (_, H) = len(slots.tokens_R), like_TH.shape
        self._slots, self._like_TH, self._dtype, self._weights_TK = slots, like_TH, dtype, weights_TK
        self._on_cpu = like_TH.device.type == "cpu"
        self._first = self._last = 0  # the rows in the buffer
        if not self._on_cpu:
            self._buffer_nH = like_TH.new_empty((R + 1, H), dtype=dtype)
            self._buffer_nH[R:] = 0  # stands for the empty slots
            return
        largest = int(slots.counts_E.max()) if slots.counts_E.numel() else 0
        chunk = min(CHUNK * torch.get_num_threads(), MOST)
        rows = min(R, max(largest, chunk // max(H * dtype.itemsize, 1)))
        size = rows * H * dtype.itemsize
        if owner is not None and chunk // 4 <= size <= chunk:  # of one size, or many would be kept
            self._buffer_nH = scratch(owner, chunk)[:size].view(dtype).view(rows, H)
        else:
            self._buffer_nH = empty(like_TH, (rows, H), dtype)
        self._out_TH = empty(like_TH, like_TH.shape, dtype).zero_()
        if weights_TK is None:
            self._weights_R = torch.ones(R, dtype=dtype)
        else:
            self._weights_R = weights_TK.flatten()[slots.order_R].to(dtype)

    def rounds(
        self, experts: Iterable[tuple[int, slice]]
    ) -> Iterator[list[tuple[int, slice, Tensor | None]]]:
        """Experts and their rows, in ascending order, as many at a time as the buffer holds.

        With each comes the place (n, H) where the values of its rows are to be written before the next round.
        """
        held: list[tuple[int, slice, Tensor | None]] = []
        for expert, rows in experts:
            if held and rows.stop - self._first > len(self._buffer_nH):
                yield held
                self._flush()
                held = []
            self._last = rows.stop
            place_nH = self._buffer_nH[rows.start - self._first : rows.stop - self._first]
            held.append((expert, rows, place_nH))
        if held:
            yield held

    def total(self) -> Tensor:
        """(T, H), in the dtype of the hidden states."""
        if self._on_cpu:
            self._flush()
            out_TH = self._out_TH
        else:
            out_TH = combine(self._buffer_nH, self._slots.rows_TK, self._weights_TK)
        return out_TH.to(self._like_TH.dtype)

    def _flush(self) -> None:
        rows = slice(self._first, self._last)
        values_nH = self._buffer_nH[: self._last - self._first].numpy()
        tokens_n, weights_n = self._slots.tokens_R[rows].numpy(), self._weights_R[rows].numpy()
        out_TH = self._out_TH.numpy()

        def add(columns: tuple[int, int]) -> None:
            add_rows(values_nH, tokens_n, weights_n, *columns, out_TH)

        pieces = split(out_TH.shape[1], torch.get_num_threads())
        run_all(add, pieces, alone=values_nH.size < ALONE)
        self._first = self._last
