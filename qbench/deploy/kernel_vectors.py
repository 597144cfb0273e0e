"""Vectors in functions compiled by numba.

A vector of 64 bytes has 16 numbers of 32 bits, one for each of 16 channels. LLVM turns an operation
on such a vector into one AVX-512 instruction, two AVX2 instructions or four SSE instructions,
depending on the processor. A table has 16 bytes. A pair of tables is one AVX2 register.

Memory is one array of bytes, and addresses are places in it. Nothing checks that an address is inside the array.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

LANES, BYTES = 16, 64
"""Number of elements and of bytes of a vector of numbers."""

TABLE = 16
"""Bytes of a table."""


class Vector(types.Type):
    """The numba type of a vector. All elements have the same numba type."""

    def __init__(self, element: Any, lanes: int = LANES) -> None:
        self.element = element
        super().__init__(f"Vector({element}, {lanes})")


INTEGERS, FLOATS = Vector(types.int32), Vector(types.float32)
ONE_TABLE, TABLES = Vector(types.uint8, TABLE), Vector(types.uint8, 2 * TABLE)
_I32, _MASK = ir.VectorType(ir.IntType(32), LANES), ir.IntType(LANES)
_I8 = ir.VectorType(ir.IntType(8), 2 * TABLE)
_LLVM = {
    INTEGERS: _I32, FLOATS: ir.VectorType(ir.FloatType(), LANES),
    ONE_TABLE: ir.VectorType(ir.IntType(8), TABLE), TABLES: _I8,
}  # fmt: skip


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, _LLVM[kind])


def _pointer(context: Any, builder: Any, memory: Any, address: Any, kind: Any) -> Any:
    """Return an LLVM pointer to a value at an address of an array of bytes."""
    data = cgutils.create_struct_proxy(types.uint8[::1])(context, builder, memory).data
    return builder.bitcast(builder.gep(data, [address]), kind.as_pointer())


def _load(result: Any, kind: Any, align: int) -> Any:
    """Return a function of (memory, address) that loads one value of the given type."""

    def load(typing: Any, memory: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(context, builder, args[0], args[1], kind), align=align)

        return result(memory, types.int64), code

    load.__qualname__ = f"load {kind}"  # names differ, for `qbench.deploy.kernel_layers.compiled`
    return intrinsic(load)


load_integers = _load(INTEGERS, _I32, 4)
load_floats = _load(FLOATS, _LLVM[FLOATS], 4)
load_table = _load(ONE_TABLE, _LLVM[ONE_TABLE], 1)
load_tables = _load(TABLES, _I8, 1)
load_word = _load(types.int32, ir.IntType(32), 1)
load_byte = _load(types.uint8, ir.IntType(8), 1)
load_half = _load(types.uint16, ir.IntType(16), 1)
load_float = _load(types.float32, ir.FloatType(), 4)


@intrinsic
def store(typing: Any, memory: Any, address: Any, value: Any) -> Any:
    """Store a vector or a single number at an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, args[0], args[1], args[2].type)
        builder.store(args[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(memory, types.int64, value), code


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Return a vector whose 16 elements are all the same int32 or float32 number."""
    vector = FLOATS if isinstance(value, types.Float) else INTEGERS

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        empty = ir.Constant(_LLVM[vector], ir.Undefined)
        first = builder.insert_element(empty, args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, ir.Constant(_I32, [0] * LANES))

    return vector(vector.element), code


@intrinsic
def count_ones(typing: Any, value: Any) -> Any:
    """Return the number of bits that are 1 in an int32, or in each element of a vector."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = "llvm.ctpop.i32" if kind == ir.IntType(32) else f"llvm.ctpop.v{LANES}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name), args)

    return value(value), code


@intrinsic
def look_up(typing: Any, tables: Any, places: Any) -> Any:
    """Look up 32 places in tables of 16 bytes: the first 16 places in the first table, the others in the second."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shuffle = ir.FunctionType(_I8, [_I8, _I8])
        return builder.call(cgutils.get_or_insert_function(builder.module, shuffle, "llvm.x86.avx2.pshuf.b"), args)

    return TABLES(TABLES, TABLES), code


@intrinsic
def no_bytes(typing: Any) -> Any:
    """Return two tables of zeros."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_I8, None)

    return TABLES(), code


@intrinsic
def add_halves(typing: Any, tables: Any) -> Any:
    """Return the sum of two tables as 16 integers."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # sums of two bytes need 16 bits
        halves = [
            builder.zext(
                builder.shuffle_vector(args[0], args[0], ir.Constant(_I32, list(range(first, first + TABLE)))),
                ir.VectorType(ir.IntType(16), TABLE),
            )
            for first in (0, TABLE)
        ]
        return builder.zext(builder.add(*halves), _I32)

    return INTEGERS(TABLES), code


@intrinsic
def at_least(typing: Any, x: Any, thresholds: Any) -> Any:
    """Return 16 bits. Bit i is 1 if element i of `x` is at least element i of `thresholds`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        compare = builder.fcmp_ordered if x == FLOATS else builder.icmp_signed
        return builder.zext(builder.bitcast(compare(">=", *args), _MASK), ir.IntType(32))

    return types.int32(x, x), code


@intrinsic
def to_floats(typing: Any, x: Any) -> Any:
    """Return a vector of integers as floats."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _LLVM[FLOATS])

    return FLOATS(INTEGERS), code


def _operator(function: Any, vector: Vector, code: Callable[[Any, Any, Any], Any]) -> None:
    """Define an elementwise function of two vectors.

    Args:
        code: function that adds the instruction to an LLVM builder and returns the result of the instruction.
    """

    @type_callable(function)
    def _(context: Any) -> Any:
        return lambda x, y: vector if x == vector == y else None

    @lower_builtin(function, vector, vector)
    def _(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return code(builder, *args)


def smaller(x: Any, y: Any) -> Any:
    """Return the elementwise minimum of two vectors of floats."""


def larger(x: Any, y: Any) -> Any:
    """Return the elementwise maximum of two vectors of floats."""


_operator(operator.add, INTEGERS, lambda builder, x, y: builder.add(x, y))
_operator(operator.sub, INTEGERS, lambda builder, x, y: builder.sub(x, y))
_operator(operator.mul, INTEGERS, lambda builder, x, y: builder.mul(x, y))
_operator(operator.and_, INTEGERS, lambda builder, x, y: builder.and_(x, y))
_operator(operator.xor, INTEGERS, lambda builder, x, y: builder.xor(x, y))
_operator(operator.add, TABLES, lambda builder, x, y: builder.add(x, y))
_operator(operator.add, FLOATS, lambda builder, x, y: builder.fadd(x, y, flags=["contract"]))
_operator(operator.mul, FLOATS, lambda builder, x, y: builder.fmul(x, y, flags=["contract"]))
_operator(smaller, FLOATS, lambda builder, x, y: builder.select(builder.fcmp_ordered("<", x, y), x, y))
_operator(larger, FLOATS, lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))
