"""A compiled function on all of torch's threads, called by a compiled function.

Where Python hands the work to the threads, each of them needs the interpreter lock to begin and to end, one
after the other: 0.1 ms around loops of 0.1 ms. In here the region of OpenMP's threads (`openmp_region`) calls
compiled code, and none of them ever holds the lock.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from monge.moe.vectors import I32

BYTES = ir.IntType(8).as_pointer()


def _call_on_threads(typing_context, region, threads, function, arguments):  # type: ignore[no-untyped-def]
    """``function(*arguments)`` on ``threads`` threads, which returns nothing; back when all calls are.

    ``region`` is the address from `openmp_region`. False if a call raised an exception.
    """
    called = function.get_call_type(typing_context, arguments.types, {})

    def generate(context, builder: ir.IRBuilder, signature, args) -> Any:  # type: ignore[no-untyped-def]
        result = function.dispatcher.get_compile_result(called)
        context.add_linking_libs([result.library])
        failed = cgutils.alloca_once_value(builder, ir.Constant(I32, 0))
        shared = cgutils.make_anonymous_struct(builder, [args[3], failed])
        body = _body(context, builder.module, shared.type, result.fndesc, called)
        start = ir.FunctionType(ir.VoidType(), [body.type, BYTES, I32, I32]).as_pointer()
        place = builder.bitcast(cgutils.alloca_once_value(builder, shared), BYTES)
        number = builder.trunc(args[1], I32)
        builder.call(builder.inttoptr(args[0], start), [body, place, number, ir.Constant(I32, 0)])
        return builder.icmp_signed("==", builder.load(failed), ir.Constant(I32, 0))

    return types.boolean(types.int64, types.int64, function, arguments), generate


call_on_threads: Any = intrinsic(_call_on_threads)


def _body(context: Any, module: ir.Module, shared: Any, callee: Any, called: Any) -> ir.Function:
    """What every thread runs: the call, with what lies where its only argument points."""
    name = module.get_unique_name(f"region.{callee.mangled_name}")
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [BYTES]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block())
    held = builder.load(builder.bitcast(body.args[0], shared.as_pointer()))
    arguments, failed = (builder.extract_value(held, place) for place in range(2))
    values = cgutils.unpack_tuple(builder, arguments, len(called.args))
    status, _ = context.call_internal_no_propagate(builder, callee, called, values)
    with builder.if_then(status.is_error):
        builder.store(ir.Constant(I32, 1), failed)
    builder.ret_void()
    return body


def _nap(typing_context):  # type: ignore[no-untyped-def]
    """Leave the core to others for some 20 microseconds (a millisecond where the system counts in those)."""

    def generate(context, builder: ir.IRBuilder, signature, args) -> Any:  # type: ignore[no-untyped-def]
        name, units = ("Sleep", 1) if os.name == "nt" else ("usleep", 20)
        sleep = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, [I32]), name)
        builder.call(sleep, [ir.Constant(I32, units)])
        return context.get_dummy_value()

    return types.void(), generate


nap: Any = intrinsic(_nap)
