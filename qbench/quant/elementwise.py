"""Executes elementwise functions in few passes over memory, if the package llvmlite is installed.

On the CPU, a function that is called often is recorded (recording.py) and compiled (native_code.py). The first result
of the compiled program is compared with the result of torch, bit for bit. Functions that cannot be recorded, and all
functions without llvmlite, are executed by torch, with the same results.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qbench.quant.program import NotRecordable
from qbench.quant.recording import record

MAX_CONSTANTS = 64
"""Largest number of elements of a tensor of constants, such as the levels of a quantizer."""

MAX_VARIANTS = 256
"""Largest number of programs of one function, each with other constants. Further variants are executed by torch."""

COMPILE_AFTER = 2**25
"""Number of elements that torch computes with a function before the function is compiled.

Compilation takes as much time as compiled code saves on a few times as many elements.
"""

FEW_ELEMENTS = 2**17
"""Programs of several stages are not used for fewer elements, because torch is faster then."""

Function = Callable[..., Any]


@dataclass
class _Key:
    """What determines the program of a function."""

    parts: Any = None
    codes: list[CodeType] = field(default_factory=list)  #: the code of the function and of all functions that it uses
    numbers: list[Tensor] = field(default_factory=list)  #: tensors with one element that these functions read


@dataclass
class _Entry:
    """What is known about a function. The function is kept because the key contains addresses of its module."""

    function: Function
    elements: int = 0  #: number of elements that torch has computed
    tried: bool = False  #: whether the function was recorded
    program: Any = None  #: the compiled program, or None if torch executes the function


_entries: dict[Any, _Entry] = {}
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
    """Remembers the last tensor whose elements a compiled function found to be finite."""

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
    """Look for inf and nan in the first arguments of compiled functions within a `with` block."""
    found = FiniteInput()
    token = _finite.set(found)
    try:
        yield found
    finally:
        _finite.reset(token)


def call(function: Function, *tensors: Tensor) -> Any:
    """Return `function(*tensors)`.

    The result of a function with a compiled program is computed by the program.

    Args:
        function: a function without side effects whose result is determined by its arguments, and by numbers, tensors
            and functions in its closure.
        tensors: the arguments. Those with axes are compiled if they have one shape and one memory format.
    """
    first = tensors[0]
    ordinary = first.device.type == "cpu" and first.dim() and all(map(_plain, tensors))
    if not (ordinary and _enabled.get() and available()) or _observed():
        return function(*tensors)
    strides = first.stride()
    full, numbers = [], []
    for t in tensors:
        if t.dim():
            full.append(t.detach())
            if t.stride() != strides or t.shape != first.shape:
                return function(*tensors)
        else:
            numbers.append(t.detach())
    key = _Key()
    try:
        key.parts = (tuple((t.dtype, t.dim() > 0) for t in tensors), _described(function, key))
    except NotRecordable:
        return function(*tensors)
    entry = _entries.get(key.parts)
    if entry is None:
        if _variants[tuple(key.codes)] == MAX_VARIANTS:
            return function(*tensors)
        _variants[tuple(key.codes)] += 1
        entry = _entries[key.parts] = _Entry(function)
    if not _dense(first):
        return function(*tensors)
    numbers += key.numbers
    program = entry.program
    if program is None or (program.stages > 1 and first.numel() < FEW_ELEMENTS):
        result = function(*tensors)
        entry.elements += first.numel()
        if not entry.tried and entry.elements >= COMPILE_AFTER:
            entry.tried = True
            entry.program = _program(function, tensors, full, numbers, key.numbers, result)
        return result
    try:
        result, finite = program(full, numbers)
    except RuntimeError:  # tensors inside torch.func's transforms have no memory
        return function(*tensors)
    found = _finite.get()
    if found and finite:
        found.remember(first)
    return result


def _plain(x: Tensor) -> bool:
    """Return whether the memory of x contains its values. Tensors that torch.export traces may have no memory."""
    return type(x) in (Tensor, Parameter) and x.layout == torch.strided and not x.is_neg()


def _observed() -> bool:
    """Return whether torch's operations are traced or counted. The observer would not see a compiled program."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch._C._get_tracing_state() is not None


def _dense(x: Tensor) -> bool:
    """Return whether the elements of x fill one part of memory without gaps."""
    return (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (torch.empty_like(x).stride() == x.stride())
    )


def _program(
    function: Function, tensors: Sequence[Tensor], full: list[Tensor], numbers: list[Tensor],
    constants: Sequence[Tensor], expected: Any,
) -> Any:  # fmt: skip
    """Return the compiled program of a function, or None if there is none that returns the expected result."""
    try:
        from qbench.quant.native_code import Compiled

        program = Compiled(record(function, tensors, constants))
        found, _ = program(full, numbers)
    except (
        Exception
    ):  # not recordable, a version of llvmlite with other functions, or a processor that it does not support
        return None
    return program if _identical(found, expected) else None


def _identical(a: Any, b: Any) -> bool:
    """Return whether tensors, or tuples of tensors, have the same elements, also in the sign of zeros."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(_identical, a, b))
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    same = (a == b) & (a.signbit() == b.signbit())
    return bool((same | (a.isnan() & b.isnan())).all())


def _described(value: Any, key: _Key) -> Any:
    """Return a description that is equal for functions that compute the same, apart from the values of `key.numbers`.

    Code objects and numbers are appended to `key`.
    """
    if isinstance(value, float):
        return "float", value.hex()
    if value is None or isinstance(value, int | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.numel() > MAX_CONSTANTS:
            raise NotRecordable("a large tensor")
        if value.dim():
            return value.dtype, tuple(value.shape), tuple(value.flatten().tolist())
        key.numbers.append(value.detach())
        return value.dtype, "one element"
    if isinstance(value, FunctionType):
        key.codes.append(value.__code__)
        parts = [cell.cell_contents for cell in value.__closure__ or ()]
        parts += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return id(value.__code__), id(value.__globals__), *(_described(part, key) for part in parts)
    if isinstance(value, partial):
        return "partial", *(_described(part, key) for part in (value.func, value.args, *sorted(value.keywords.items())))
    if isinstance(value, tuple):
        return type(value), *(_described(part, key) for part in value)
    raise NotRecordable(f"a closure over {type(value).__name__}")
