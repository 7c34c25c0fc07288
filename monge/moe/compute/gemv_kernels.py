"""Compiled experts: both projections, the activation and the sum into the tokens in one function.

Both projections keep transformers' layout, whose rows are contiguous over the summed dimension: every output
is a dot product of two contiguous vectors, and no weight is copied but for the 64 rows at work where many
tokens meet them (row_products.py). Bfloat16 weights are read as uint16, their bits, and so are hidden states
and activations where the processor multiplies them.

The work is cut into items, which threads claim one by one: who wakes late does less, and nobody waits for a
thread that has not begun. Every output is written in one item and sums run in a fixed order: results do not
depend on the threads.

Shapes: T tokens, R rows, the filled slots sorted by expert, K slots per token, S = T K, E experts, H model
width, I expert width, J = 2 I (gated) or I; expert e has the rows starts[e]..starts[e + 1] - 1; m of an item.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from monge.moe.activation_kernels import activate
from monge.moe.compute.region import call_on_threads, nap
from monge.moe.compute.row_products import ROWS, add_projected, empty_sums, project
from monge.moe.cpu_kernels import AHEAD, compiled, empty_lines, prefetch, write

NEURONS, FEATURES = 128, 64
"""Rows of the input and of the output projection in an item."""
SPINS = 20_000
"""Looks at what the other threads have done, some 0.2 ms, before a thread sleeps."""
CLAIMED_IN, CLAIMED_OUT, DONE_IN = 0, 8, 16
"""Where the counters of claimed items lie, a cache line apart, and of those done, one for each expert."""


def _atomic_add(typing_context, counters, index, value):  # type: ignore[no-untyped-def]
    """``counters[index] += value`` as one step for all threads; returns what was there before."""

    def generate(context, builder: ir.IRBuilder, signature, args):  # type: ignore[no-untyped-def]
        counters_type = signature.args[0]
        array = context.make_array(counters_type)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, counters_type, array, [args[1]])
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), generate


_add_to: Any = intrinsic(_atomic_add)


@compiled
def run_on_threads(region, threads, arguments):
    """`run_experts` with these arguments on the threads of that region; False if memory ran out."""
    return call_on_threads(region, threads, run_experts, arguments)


@compiled
def run_experts(
    x_TH, starts_E1, tokens_R, order_R, gates_S, proj_in_EJH, bias_EJ, proj_out_EHI, function,
    pre_RJ, act_RI, out_TH, counters, threads,
):  # fmt: skip
    """``out_t = sum_k gates_tk expert(x_t)`` by all threads that call this with the same arguments.

    It is whole when all of these calls are back.

    Args:
        bias_EJ: (E, J) or (E, 0) for none. function: of `FUNCTIONS`.
        pre_RJ, act_RI, out_TH: are overwritten, whatever they hold; act has the dtype of x, sums that of the
            gates; pre is (0, J) if the pre-activations are not to be kept.
        counters: int64, `DONE_IN` and E zeros.
        threads: that call this.
    """
    E, H, I = proj_out_EHI.shape
    parts = (I + NEURONS - 1) // NEURONS
    largest = 0
    for e in range(E):
        largest = max(largest, starts_E1[e + 1] - starts_E1[e])
    gate_nm, up_nm = empty_sums(x_TH, max(largest, ROWS), NEURONS), empty_sums(x_TH, largest, NEURONS)
    while True:
        item = _add_to(counters, CLAIMED_IN, 1)
        if item >= E * parts:
            break
        e, first = item // parts, item % parts * NEURONS
        if starts_E1[e] < starts_E1[e + 1]:
            last, rows = min(first + NEURONS, I), slice(starts_E1[e], starts_E1[e + 1])
            later = (item + threads) % (E * parts)
            ahead_X = proj_in_EJH[later // parts, later % parts * NEURONS :]
            gate_mH, up_mH = proj_in_EJH[e, first:last], proj_in_EJH[e, I + first : I + last]
            project(x_TH, tokens_R[rows], gate_mH, gate_nm, up_mH if len(up_mH) else ahead_X)
            project(x_TH, tokens_R[rows], up_mH, up_nm, ahead_X)
            activate(gate_nm, up_nm, bias_EJ[e], first, last, function, act_RI[rows], pre_RJ[rows])
            _add_to(counters, DONE_IN + e, 1)
    blocks = (H + FEATURES - 1) // FEATURES
    # columns of out are too far apart for the cache
    sums_Tm = empty_lines(len(x_TH), FEATURES, gates_S.dtype)
    while True:
        item = _add_to(counters, CLAIMED_OUT, 1)
        if item >= blocks:
            break
        first, last = item * FEATURES, min((item + 1) * FEATURES, H)
        here_Tm = sums_Tm[:, : last - first]
        here_Tm[:] = 0
        for e in range(E):  # sums in this order
            rows, ahead_X = slice(starts_E1[e], starts_E1[e + 1]), proj_out_EHI[(e + 1) % E, first:]
            if rows.start < rows.stop:
                _wait(counters, DONE_IN + e, parts)
                weights_mI = proj_out_EHI[e, first:last]
                slots_n, tokens_n = order_R[rows], tokens_R[rows]
                add_projected(act_RI[rows], weights_mI, gates_S, slots_n, here_Tm, tokens_n, gate_nm, ahead_X)
        for t in range(len(out_TH)):
            prefetch(out_TH, t + AHEAD, first, last)
            for m in range(last - first):
                write(out_TH[t], first + m, sums_Tm[t, m])


@compiled
def _wait(counters, index, items):
    """Look until so many items are done. Who has the last may have lost its core: sleep now and then."""
    looks = 0
    while _add_to(counters, index, 0) < items:
        looks += 1
        if looks % SPINS == 0:
            nap()
