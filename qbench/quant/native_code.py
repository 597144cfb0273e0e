"""Compiles programs (program.py) to machine code with LLVM, through the package llvmlite.

llvmlite is installed with numba, which the extra `fast` contains. A program is compiled once in a process, which takes
tens of milliseconds. LLVM is not allowed to reorder or contract operations on floats, so the results are bit-identical
to those of torch.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from llvmlite import binding
from llvmlite.ir import FloatType, Function, FunctionType, IntType, IRBuilder, Module, Value
from torch import Tensor

from qbench.quant.program import Call, Full, Number, Operand, Operation, Program
from qbench.quant.recorded_operations import COMPARISONS

CType = type[ctypes.c_int64] | type[ctypes.c_void_p] | type[ctypes.c_float]

CHUNK = 2**15
"""Smallest number of elements for which another thread is worthwhile."""

I8, I16, I32, I64, F32 = IntType(8), IntType(16), IntType(32), IntType(64), FloatType()
MEMORY = {torch.float32: F32, torch.bfloat16: I16, torch.uint8: I8, torch.int16: I16}
"""Maps the type of a tensor to the type of its elements in memory.

In registers, elements are float32 numbers if the tensor has a floating-point type, else 32-bit integers.
"""
FLOATS = (torch.float32, torch.bfloat16)
MATH = {"round": "rint", "abs": "fabs", "floor": "floor", "ceil": "ceil", "trunc": "trunc"}
EXPONENT = 0x7F800000
"""The bits of the exponent of a float32 number. Only in inf and nan, all of these bits are 1."""


class Loop:
    """A compiled loop over all elements, which computes some of the operations of a program."""

    def __init__(self, operations: Sequence[Operation], outputs: Sequence[int]) -> None:
        needed = _needed(operations, outputs)
        self.inputs = [i for i in needed if _is_argument(operations[i])]
        self.numbers = sorted({o.slot for i in needed for o in operations[i].operands if isinstance(o, Number)})
        self.types = [operations[i].dtype for i in outputs]
        self.code, self._engine = _compiled(_assembly(operations, needed, self.inputs, self.numbers, outputs))

    def __call__(self, full: dict[int, Tensor], slots: Sequence[Tensor | None]) -> tuple[list[Tensor], bool]:
        """Return the outputs, and whether all elements of the first input are finite.

        Args:
            full: maps the index of an argument operation to a tensor. All have the same shape and memory format.
            slots: tensors with one element, or with shape (N,) if each of N samples has its own number. The samples
                follow each other in memory.
        """
        like = full[self.inputs[0]]
        results = [torch.empty_like(like, dtype=dtype) for dtype in self.types]
        addresses = [t.data_ptr() for t in (*(full[i] for i in self.inputs), *results)]
        numbers = [slots[i].tolist() for i in self.numbers]  # type: ignore[union-attr]
        count, threads = like.numel(), torch.get_num_threads()
        samples = max([len(number) for number in numbers if isinstance(number, list)], default=0)
        alone = threads == 1 or count < 2 * CHUNK
        if alone and not samples:
            return results, not self.code(0, count, *addresses, *numbers)
        size = max(1, count // samples if samples else count if alone else max(CHUNK, -(-count // threads)))
        parts = [
            (start, min(start + size, count), *addresses, *(n[i] if isinstance(n, list) else n for n in numbers))
            for i, start in enumerate(range(0, count, size))
        ]
        run = map if alone else _threads().map
        return results, not any(list(run(lambda part: self.code(*part), parts)))  # waits for all


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="qbench-elementwise")


def _needed(operations: Sequence[Operation], outputs: Iterable[int]) -> list[int]:
    """Return the indices of the outputs and of all operations on which they depend, in ascending order."""
    found: set[int] = set()
    waiting = list(outputs)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting += _elementwise(operations[index])
    return sorted(found)


def _elementwise(operation: Operation) -> list[int]:
    """Return the indices of the operations whose results an operation reads."""
    return [] if _is_argument(operation) else [o for o in operation.operands if type(o) is int]


def _is_argument(operation: Operation) -> bool:
    return operation.name == "argument"


def _assembly(
    operations: Sequence[Operation],
    needed: Sequence[int],
    inputs: Sequence[int],
    numbers: Sequence[int],
    outputs: Sequence[int],
) -> tuple[str, list[CType]]:
    """Return the LLVM assembly of a loop function, and the ctypes of its arguments.

    The arguments of the loop function are the index of the first element, the index after the last element, the
    addresses of inputs and outputs, and the numbers. The loop function returns 1 if an element of the first input is
    not finite, else 0.
    """
    module = Module("elementwise")
    memory = [MEMORY[operations[i].dtype] for i in (*inputs, *outputs)]
    kinds = [I64, I64, *(kind.as_pointer() for kind in memory), *(F32 for _ in numbers)]
    function = Function(module, FunctionType(I32, kinds), "loop")
    first, end, *rest = function.args
    arrays, values = rest[: len(memory)], dict(zip(map(Number, numbers), rest[len(memory) :], strict=True))
    for array in arrays[len(inputs) :]:
        array.add_attribute("noalias")  # results are new tensors
    entry, body, done = (function.append_basic_block(name) for name in ("entry", "body", "done"))
    builder = IRBuilder(entry)
    builder.cbranch(builder.icmp_signed("<", first, end), body, done)

    builder.position_at_end(body)
    place, wrong = builder.phi(I64), builder.phi(I32)
    place.add_incoming(first, entry)
    wrong.add_incoming(I32(0), entry)
    results: dict[int, Value] = {}

    def value(operand: Operand) -> Value:
        if isinstance(operand, Number):
            return values[operand]
        return results[operand] if type(operand) is int else F32(operand)

    for index in needed:
        name, operands, dtype, _ = operations[index]
        if name == "argument":
            array = arrays[inputs.index(index)]
            results[index] = _widened(builder, builder.load(builder.gep(array, [place])), dtype)
        elif name == "convert":
            source = operations[operands[0]].dtype  # type: ignore[index]  # converted values have an index
            results[index] = _converted(builder, value(operands[0]), source, dtype)
        else:
            results[index] = _operation(builder, name, [value(o) for o in operands])
    for array, index in zip(arrays[len(inputs) :], outputs, strict=True):
        builder.store(_narrowed(builder, results[index], operations[index].dtype), builder.gep(array, [place]))
    bad = wrong
    if operations[inputs[0]].dtype in FLOATS:
        exponent = builder.and_(builder.bitcast(results[inputs[0]], I32), I32(EXPONENT))
        bad = builder.or_(wrong, builder.zext(builder.icmp_unsigned("==", exponent, I32(EXPONENT)), I32))
    following = builder.add(place, I64(1), flags=("nsw", "nuw"))
    place.add_incoming(following, body)
    wrong.add_incoming(bad, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, done)

    builder.position_at_end(done)
    total = builder.phi(I32)
    total.add_incoming(I32(0), entry)
    total.add_incoming(bad, body)
    builder.ret(total)
    types: list[CType] = [*[ctypes.c_int64] * 2, *[ctypes.c_void_p] * len(memory), *[ctypes.c_float] * len(numbers)]
    return str(module), types


def _operation(builder: IRBuilder, name: str, operands: list[Value]) -> Value:
    """Append one operation on registers and return its result."""
    if name in ("fadd", "fsub", "fmul", "fdiv", "select"):
        return getattr(builder, name)(*operands)
    if name in COMPARISONS:
        symbol = COMPARISONS[name]
        compare = builder.fcmp_unordered if name == "ne" else builder.fcmp_ordered
        return compare(symbol, *operands)
    if name == "neg":
        return builder.fneg(*operands)
    if name in MATH:
        return builder.call(builder.module.declare_intrinsic(f"llvm.{MATH[name]}", [F32]), operands)
    if name == "not":
        return builder.not_(*operands)
    if name == "copy":
        return operands[0]
    return {"and": builder.and_, "or": builder.or_}[name](*operands)


def _widened(builder: IRBuilder, value: Value, dtype: torch.dtype) -> Value:
    """Return an element that was loaded from memory as a register value."""
    if dtype == torch.bfloat16:
        return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)
    if dtype == torch.uint8:
        return builder.zext(value, I32)
    return builder.sext(value, I32) if dtype == torch.int16 else value


def _narrowed(builder: IRBuilder, value: Value, dtype: torch.dtype) -> Value:
    """Return a register value as an element that can be stored in memory."""
    if dtype == torch.bfloat16:
        return builder.trunc(builder.lshr(builder.bitcast(value, I32), I32(16)), I16)
    return value if dtype == torch.float32 else builder.trunc(value, MEMORY[dtype])


def _converted(builder: IRBuilder, value: Value, source: torch.dtype, dtype: torch.dtype) -> Value:
    """Convert a register value from one type to another."""
    if dtype in FLOATS:
        if source == torch.bool:
            return builder.uitofp(value, F32)
        if source not in FLOATS:
            return builder.sitofp(value, F32)
        return _rounded_to_bfloat16(builder, value) if dtype == torch.bfloat16 else value
    return builder.zext(value, I32) if source == torch.bool else builder.fptosi(value, I32)


def _rounded_to_bfloat16(builder: IRBuilder, value: Value) -> Value:
    """Round a float32 number to the nearest bfloat16 number, halves to even. The result is a float32 number."""
    bits = builder.bitcast(value, I32)
    # Let the unit be the lowest bit that is kept. Add half a unit if this bit is 1, else slightly less. The carry then
    # rounds up.
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.and_(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(0xFFFF0000))
    # For nan, the carry could change the sign bit, so return the nan that torch returns.
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.bitcast(builder.select(is_nan, I32(0x7FC00000), rounded), F32)


def _processor() -> binding.TargetMachine:
    """Return LLVM's description of this machine. An engine owns its description, so every engine needs a new one."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    found = binding.get_host_cpu_features()
    features = found.flatten()
    if found.get("avx512f"):
        # By default, LLVM uses half of the register on most processors, because wide instructions can lower their clock
        # rate. torch's convolutions use the whole register anyway.
        features += ",-prefer-256-bit"
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3
    )


def _compiled(assembly: tuple[str, list[CType]]) -> tuple[Callable[..., int], binding.ExecutionEngine]:
    """Compile assembly. Return the compiled function, and the engine that owns the machine code."""
    text, types = assembly
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.loop_unrolling = True
    processor = _processor()
    passes = binding.create_pass_builder(processor, options)
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, processor)
    engine.finalize_object()
    return ctypes.CFUNCTYPE(ctypes.c_int32, *types)(engine.get_function_address("loop")), engine


class Compiled:
    """A compiled program. It is called like the function from which the program was recorded.

    The loops and calls run in stages. In each stage, the calls run before the loop. The loop needs only numbers from
    calls of its own stage and earlier stages.
    """

    def __init__(self, program: Program) -> None:
        operations, calls = program.operations, program.calls
        self.results, self.single = program.results, program.single
        wanted = {r.operation for r in program.results if isinstance(r, Full)}
        last = max((operations[i].stage for i in wanted), default=0)
        self._stages: list[tuple[list[Call], list[int], Loop | None]] = []
        for stage in range(max([last, *(call.stage for call in calls)]) + 1):
            reduced = {o.operation for call in calls for o in call.operands if isinstance(o, Full)}
            reduced = {i for i in reduced if operations[i].stage == stage}
            outputs = sorted(
                i for i in reduced | (wanted if stage == last else set()) if not _is_argument(operations[i])
            )
            loop = Loop(operations, outputs) if outputs else None
            self._stages.append(([call for call in calls if call.stage == stage], outputs, loop))
        self.stages = len(self._stages)
        self.arguments = [i for i, operation in enumerate(operations) if _is_argument(operation)]
        self.count = len(calls)

    def __call__(self, full: Sequence[Tensor], numbers: Sequence[Tensor]) -> tuple[Any, bool]:
        """Return the result of the function, and whether the first tensor is known to have only finite elements.

        Only the caller knows the type of the result.

        Args:
            full: arguments with the same shape and memory format.
            numbers: arguments and constants with one element, or with one element for each sample.
        """
        if self.count and any(number.dim() for number in numbers):
            raise RuntimeError("calls expect tensors with one element")
        tensors = dict(zip(self.arguments, full, strict=True))
        slots: list[Tensor | None] = [*numbers, *[None] * self.count]
        finite = False
        for calls, outputs, loop in self._stages:
            for function, args, kwargs, slot, _ in calls:
                args = tuple(_actual(value, tensors, slots) for value in args)
                slots[slot] = function(*args, **{key: _actual(value, tensors, slots) for key, value in kwargs.items()})
            if loop:
                results, all_finite = loop(tensors, slots)
                finite |= all_finite and loop.inputs[0] == self.arguments[0]
                tensors.update(zip(outputs, results, strict=True))
        found = tuple(slots[r.slot] if isinstance(r, Number) else tensors[r.operation] for r in self.results)
        return found[0] if self.single else found, finite


def _actual(value: object, full: dict[int, Tensor], slots: Sequence[Tensor | None]) -> object:
    """Return the tensor that a `Number` or `Full` stands for. Return any other value unchanged."""
    if isinstance(value, Number):
        return slots[value.slot]
    return full[value.operation] if isinstance(value, Full) else value
