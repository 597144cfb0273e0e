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
from dataclasses import dataclass, field
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

Result = TypeVar("Result")
Function = Callable[..., object]


@dataclass
class _Key:
    """The values that determine the program of a function."""

    parts: object = None
    codes: list[CodeType] = field(default_factory=list)  #: the code of the function and of all functions that it uses
    numbers: list[Tensor] = field(default_factory=list)  #: tensors with one element that these functions read


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
    ordinary = first.device.type == "cpu" and first.dim() and all(map(_plain, tensors))
    if not (ordinary and _enabled.get() and available()) or _observed() or first.numel() < FEW_ELEMENTS:
        return function(*tensors)
    strides = first.stride()
    full, numbers, examples = [], [], []
    for t in tensors:
        if t.stride() == strides and t.shape == first.shape:
            full.append(t.detach())
            examples.append(t)
        elif not t.dim() or _per_sample(t, first):
            numbers.append(t.detach().flatten() if t.dim() else t.detach())
            examples.append(t.flatten()[0] if t.dim() else t)
        else:
            return function(*tensors)
    key = _Key()
    try:
        kinds = tuple((t.dtype, t.dim() > 0, e.dim() > 0) for t, e in zip(tensors, examples, strict=True))
        key.parts = (kinds, _described(function, key))
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
    if program is None or (program.stages > 1 and first.numel() < FEW_ELEMENTS_OF_STAGES):
        result = function(*tensors)
        entry.elements += first.numel()
        if not entry.tried and entry.elements >= COMPILE_AFTER:
            entry.tried = True
            entry.program = _program(function, examples, full, numbers, key.numbers, result)
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


def _plain(x: Tensor) -> bool:
    """Return whether the memory of x contains its values. Tensors that torch.export traces may have no memory."""
    return type(x) in (Tensor, Parameter) and x.layout == torch.strided and not x.is_neg()


def _observed() -> bool:
    """Return whether torch's operations are traced or counted. A compiled program would not be traced or counted."""
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


def _described(value: object, key: _Key) -> object:
    """Return a description of a function or of a value in its closure.

    Functions with equal descriptions differ at most in the values of `key.numbers`. The function appends code objects
    and one-element tensors to `key`.
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
