"""Vectors in functions compiled by numba.

A vector of 64 bytes has 16 numbers of 32 bits, one for each of 16 channels. LLVM turns an operation
on such a vector into one AVX-512 instruction, two AVX2 instructions or four SSE instructions,
depending on the processor. A table has 16 bytes. A pair of tables is one AVX2 register.

Memory is one array of bytes, and addresses are places in it. Nothing checks that an address is inside the array.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.datamodel import DataModelManager, models
from numba.core.typing import Context, Signature
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

from qbench.deploy.kernel_addresses import At

Bytes = npt.NDArray[np.uint8]
"""The memory of a network."""

Args = Sequence[ir.Value]
"""The arguments of a call in LLVM's code."""

Code = Callable[[BaseContext, ir.IRBuilder, Signature, Args], ir.Value]
"""Function that adds the instructions of a call to an LLVM builder, and returns the result of the call."""

Integer = int | np.integer
"""An address, or bits that were loaded from memory."""

Loaded = TypeVar("Loaded")
Load = Callable[[Bytes, Integer], Loaded]
"""Function of (memory, address) that loads one value."""

LANES, BYTES = 16, 64
"""Number of elements and of bytes of a vector of numbers."""

TABLE = 16
"""Bytes of a table."""


class Vector(Protocol):
    """A vector in the source of a compiled function. Vectors exist only in compiled code.

    `_operator` defines the operators that each type of vector has.
    """

    def __add__(self, other: Self) -> Self: ...
    def __sub__(self, other: Self) -> Self: ...
    def __mul__(self, other: Self) -> Self: ...
    def __and__(self, other: Self) -> Self: ...
    def __xor__(self, other: Self) -> Self: ...


Source = Callable[[Bytes, At, int, int, int, int], Vector]
"""Function (memory, at, y, x, output, vector of channels) -> 16 values.

`output` is the index of the vector in the whole output, and `vector of channels` is its index within a pixel.
"""

ToCodes = Callable[[Bytes, At, int, int, Vector], None]
"""Function (memory, at, parameters, place, values) that stores the codes of 16 values."""


class VectorType(types.Type):
    """The numba type of a vector. All elements have the same numba type."""

    def __init__(self, element: types.Type, lanes: int = LANES) -> None:
        self.element = element
        super().__init__(f"Vector({element}, {lanes})")


INTEGERS, FLOATS = VectorType(types.int32), VectorType(types.float32)
ONE_TABLE, TABLES = VectorType(types.uint8, TABLE), VectorType(types.uint8, 2 * TABLE)
_I32, _MASK = ir.VectorType(ir.IntType(32), LANES), ir.IntType(LANES)
_I8 = ir.VectorType(ir.IntType(8), 2 * TABLE)
_LLVM = {
    INTEGERS: _I32, FLOATS: ir.VectorType(ir.FloatType(), LANES),
    ONE_TABLE: ir.VectorType(ir.IntType(8), TABLE), TABLES: _I8,
}  # fmt: skip


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: DataModelManager, kind: VectorType) -> None:
        super().__init__(manager, kind, _LLVM[kind])


def _pointer(
    context: BaseContext, builder: ir.IRBuilder, memory: ir.Value, address: ir.Value, kind: ir.Type
) -> ir.Value:
    """Return an LLVM pointer to a value at an address of an array of bytes."""
    data = cgutils.create_struct_proxy(types.uint8[::1])(context, builder, memory).data
    return builder.bitcast(builder.gep(data, [address]), kind.as_pointer())


def _load(result: types.Type, kind: ir.Type, align: int) -> Load[Loaded]:
    """Return a function of (memory, address) that loads one value of the given type."""

    def load(typing: Context, memory: types.Type, address: types.Type) -> tuple[Signature, Code]:
        def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
            return builder.load(_pointer(context, builder, args[0], args[1], kind), align=align)

        return result(memory, types.int64), code

    load.__qualname__ = f"load {kind}"  # `qbench.deploy.kernel_compile.compiled` needs different names
    loader: Load[Loaded] = intrinsic(load)
    return loader


load_integers: Load[Vector] = _load(INTEGERS, _I32, 4)
load_floats: Load[Vector] = _load(FLOATS, _LLVM[FLOATS], 4)
load_table: Load[Vector] = _load(ONE_TABLE, _LLVM[ONE_TABLE], 1)
load_tables: Load[Vector] = _load(TABLES, _I8, 1)
load_word: Load[np.int32] = _load(types.int32, ir.IntType(32), 1)
load_half: Load[np.uint16] = _load(types.uint16, ir.IntType(16), 1)
load_float: Load[np.float32] = _load(types.float32, ir.FloatType(), 4)


@intrinsic
def store(typing: Context, memory: types.Type, address: types.Type, value: types.Type) -> tuple[Signature, Code]:
    """Store a vector or a single number at an address."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        pointer = _pointer(context, builder, args[0], args[1], args[2].type)
        builder.store(args[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(memory, types.int64, value), code


@intrinsic
def splat(typing: Context, value: types.Type) -> tuple[Signature, Code]:
    """Return a vector whose 16 elements are all the same int32 or float32 number."""
    vector = FLOATS if isinstance(value, types.Float) else INTEGERS

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        empty = ir.Constant(_LLVM[vector], ir.Undefined)
        first = builder.insert_element(empty, args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, ir.Constant(_I32, [0] * LANES))

    return vector(vector.element), code


@intrinsic
def count_ones(typing: Context, value: types.Type) -> tuple[Signature, Code]:
    """Return the number of bits that are 1 in an int32, or in each element of a vector."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        kind = args[0].type
        name = "llvm.ctpop.i32" if kind == ir.IntType(32) else f"llvm.ctpop.v{LANES}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name), args)

    return value(value), code


@intrinsic
def look_up(typing: Context, tables: types.Type, places: types.Type) -> tuple[Signature, Code]:
    """Look up 32 places in tables of 16 bytes: the first 16 places in the first table, the others in the second."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        shuffle = ir.FunctionType(_I8, [_I8, _I8])
        return builder.call(cgutils.get_or_insert_function(builder.module, shuffle, "llvm.x86.avx2.pshuf.b"), args)

    return TABLES(TABLES, TABLES), code


@intrinsic
def no_bytes(typing: Context) -> tuple[Signature, Code]:
    """Return two tables of zeros."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        return ir.Constant(_I8, None)

    return TABLES(), code


@intrinsic
def add_halves(typing: Context, tables: types.Type) -> tuple[Signature, Code]:
    """Return the sum of two tables as 16 integers."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
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
def at_least(typing: Context, x: types.Type, thresholds: types.Type) -> tuple[Signature, Code]:
    """Return 16 bits. Bit i is 1 if element i of `x` is at least element i of `thresholds`."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        compare = builder.fcmp_ordered if x == FLOATS else builder.icmp_signed
        return builder.zext(builder.bitcast(compare(">=", *args), _MASK), ir.IntType(32))

    return types.int32(x, x), code


@intrinsic
def to_floats(typing: Context, x: types.Type) -> tuple[Signature, Code]:
    """Return a vector of integers as floats."""

    def code(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        return builder.sitofp(args[0], _LLVM[FLOATS])

    return FLOATS(INTEGERS), code


def _operator(
    function: Callable[..., object], vector: VectorType, code: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
) -> None:
    """Define an elementwise function of two vectors.

    Args:
        code: function of (builder, x, y) that adds the LLVM instruction of the operator, and returns its result.
    """

    @type_callable(function)
    def _(context: Context) -> Callable[[types.Type, types.Type], VectorType | None]:
        return lambda x, y: vector if x == vector == y else None

    @lower_builtin(function, vector, vector)
    def _(context: BaseContext, builder: ir.IRBuilder, signature: Signature, args: Args) -> ir.Value:
        return code(builder, *args)


def smaller(x: Vector, y: Vector) -> Vector:
    """Return the elementwise minimum of two vectors of floats."""
    raise NotImplementedError("only compiled code has vectors")


def larger(x: Vector, y: Vector) -> Vector:
    """Return the elementwise maximum of two vectors of floats."""
    raise NotImplementedError("only compiled code has vectors")


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
