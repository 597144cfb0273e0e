"""Executes elementwise functions in few passes over memory, if the package llvmlite is installed.

On the CPU, a function that is called often is recorded (recording.py) and compiled (native_code.py). The first result
of the compiled program is compared with the result of torch, bit for bit. If they differ, or if a function cannot be
recorded, torch continues to execute the function. Without llvmlite, torch executes all functions. The results are
always the same.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from qbench.quant.program import NotRecordable
from qbench.quant.recording import record

if TYPE_CHECKING:
    from qbench.quant.native_code import Compiled

MAX_CONSTANTS = 64
"""Largest number of elements of a constant tensor in a function's closure, such as the levels of a quantizer."""

MAX_VARIANTS = 256
"""Largest number of programs of one function, one for each set of constants. torch executes all others."""

COMPILE_AFTER = 2**25
"""Number of elements that torch computes with a function before the function is compiled.

After a few times this number of elements, the compiled code has saved as much time as its compilation took.
"""

FEW_PER_SAMPLE = 2**10
"""With fewer elements per sample, torch is faster than a program with one number per sample, which runs once for each
sample."""

FEW_ELEMENTS = 2**16
"""For fewer elements, torch executes the function, because finding its program takes as long as executing it."""

FEW_ELEMENTS_OF_STAGES = 2**17
"""For fewer elements, torch is faster than a program of several stages."""

FULL, PER_SAMPLE, ONE = "a value for each element", "one element for each sample", "one element"
"""Kinds of arguments."""

Result = TypeVar("Result")
Function = Callable[..., object]


@dataclass
class _Entry:
    """The state of one function. `function` stays alive, so that no other object gets the addresses in its key."""

    function: Function
    elements: int = 0  #: number of elements that torch has computed
    tried: bool = False  #: whether recording the function was tried
    program: "Compiled | None" = None  #: the compiled program, or None if torch executes the function


_entries: dict[object, _Entry] = {}
_variants: Counter[tuple[CodeType, ...]] = Counter()
_enabled = ContextVar("compiled", default=True)


@contextmanager
def torch_operations() -> Iterator[None]:
    """Execute elementwise functions by torch alone within a `with` block. The results are the same."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


@cache
def available() -> bool:
    """Return whether functions can be compiled."""
    return find_spec("llvmlite") is not None


class FiniteInput:
    """Remembers the last tensor in which a compiled function found neither inf nor nan."""

    _tensor: Tensor | None = None

    def remember(self, x: Tensor) -> None:
        """Remember that all elements of x are finite."""
        self._tensor = x

    def is_finite(self, x: Tensor) -> bool:
        """Return whether all elements of x are known to be finite."""
        known = self._tensor
        return known is not None and (known.data_ptr(), known.shape) == (x.data_ptr(), x.shape)


_finite: ContextVar[FiniteInput | None] = ContextVar("finite", default=None)


@contextmanager
def finite_input() -> Iterator[FiniteInput]:
    """Check the first argument of each compiled function for inf and nan within a `with` block."""
    found = FiniteInput()
    token = _finite.set(found)
    try:
        yield found
    finally:
        _finite.reset(token)


def call(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """Return `function(*tensors)`.

    If the function has a compiled program, this program computes the result.

    Args:
        function: a function without side effects. Its result must depend only on its arguments, and on the numbers,
            tensors and functions in its closure.
        tensors: the arguments. A compiled program is used only if each tensor has the shape and the strides of the
            first one, or no axes, or one element for each index of the first axis, such as the shape (N, 1, 1, 1).
    """
    first = tensors[0]
    if not (_enabled.get() and available() and readable(tensors)) or first.numel() < FEW_ELEMENTS:
        return function(*tensors)
    shape, strides = first.shape, first.stride()
    full: list[Tensor] = []
    numbers: list[Tensor] = []
    kinds: list[tuple[torch.dtype, str]] = []
    for t in tensors:
        kind = FULL if t.stride() == strides and t.shape == shape else PER_SAMPLE if t.dim() else ONE
        if kind == PER_SAMPLE and not _per_sample(t, first):
            return function(*tensors)
        kinds.append((t.dtype, kind))
        t = t.detach() if t.requires_grad else t
        (full if kind == FULL else numbers).append(t.flatten() if kind == PER_SAMPLE else t)
    codes: list[CodeType] = []
    constants: list[Tensor] = []
    try:
        key = (*kinds, _described(function, codes, constants))
    except NotRecordable:
        return function(*tensors)
    entry = _entries.get(key)
    if entry is None:
        if _variants[tuple(codes)] == MAX_VARIANTS:
            return function(*tensors)
        _variants[tuple(codes)] += 1
        entry = _entries[key] = _Entry(function)
    if not is_dense(first):
        return function(*tensors)
    numbers += constants
    program = entry.program
    if program is None or (program.stages > 1 and first.numel() < FEW_ELEMENTS_OF_STAGES):
        result = function(*tensors)
        entry.elements += first.numel()
        if not entry.tried and entry.elements >= COMPILE_AFTER:
            entry.tried = True
            examples = [
                t.flatten()[0] if kind == PER_SAMPLE else t for t, (_, kind) in zip(tensors, kinds, strict=True)
            ]
            entry.program = _program(function, examples, full, numbers, constants, result)
        return result
    try:
        result, finite = program(full, numbers)
    except RuntimeError:  # tensors inside torch.func's transforms have no memory
        return function(*tensors)
    found = _finite.get()
    if found and finite:
        found.remember(first)
    return result


def _per_sample(x: Tensor, first: Tensor) -> bool:
    """Return whether x has one element for each index of the first axis of `first`, and samples have many elements."""
    count = first.shape[0]
    one_each = x.dim() == first.dim() and x.shape[0] == count == x.numel()
    return one_each and first.numel() >= count * FEW_PER_SAMPLE and first.stride(0) * count == first.numel()


def readable(tensors: Sequence[Tensor]) -> bool:
    """Return whether compiled code may read the memory of tensors on a CPU. The first tensor has at least one axis.

    Tensors that torch.export traces may have no memory. If torch's operations are traced or counted, a program would
    not be traced or counted.
    """
    for x in tensors:
        if type(x) not in (Tensor, Parameter) or x.layout != torch.strided or x.is_neg():
            return False
    first = tensors[0]
    if first.device.type != "cpu" or not first.dim():
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return not modes and torch._C._get_tracing_state() is None


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of x fill one part of memory without gaps."""
    return (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (torch.empty_like(x).stride() == x.stride())
    )


def _program(
    function: Function, examples: Sequence[Tensor], full: list[Tensor], numbers: list[Tensor],
    constants: Sequence[Tensor], expected: object,
) -> "Compiled | None":  # fmt: skip
    """Return the compiled program of a function, or None if there is none that returns the expected result."""
    try:
        from qbench.quant.native_code import Compiled

        program = Compiled(record(function, examples, constants))
        found, _ = program(full, numbers)
    except (
        Exception
    ):  # not recordable, a version of llvmlite with other functions, or a processor that llvmlite does not support
        return None
    return program if _identical(found, expected) else None


def _identical(a: object, b: object) -> bool:
    """Return whether tensors, or tuples of tensors, have the same elements, including the signs of zeros."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(_identical, a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    same = (a == b) & (a.signbit() == b.signbit())
    return bool((same | (a.isnan() & b.isnan())).all())


def _described(value: object, codes: list[CodeType], numbers: list[Tensor]) -> object:
    """Return a description of a function or of a value in its closure.

    Functions with equal descriptions differ at most in the values of `numbers`.

    Args:
        value: the function or the value.
        codes: the code objects of all functions that were found are appended to this list.
        numbers: the tensors with one element that were found are appended to this list.
    """
    if isinstance(value, float):
        return "float", value.hex()
    if value is None or isinstance(value, int | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, FunctionType):
        code = value.__code__
        codes.append(code)
        parts = [_described(cell.cell_contents, codes, numbers) for cell in value.__closure__ or ()]
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            parts.append(_described(default, codes, numbers))
        return id(code), id(value.__globals__), *parts
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() > MAX_CONSTANTS:
            raise NotRecordable("a large tensor")
        if value.dim():
            return value.dtype, tuple(value.shape), tuple(value.flatten().tolist())
        numbers.append(value.detach())
        return value.dtype, "one element"
    if isinstance(value, partial):
        bound = (value.func, value.args, *sorted(value.keywords.items()))
        return "partial", *(_described(part, codes, numbers) for part in bound)
    if isinstance(value, tuple):
        return type(value), *(_described(part, codes, numbers) for part in value)
    raise NotRecordable(f"a closure over {type(value).__name__}")
