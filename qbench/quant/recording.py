"""Records elementwise functions of tensors as programs, from which `native_code.py` makes machine code.

A function such as the forward pass of a quantizer applies several torch operations one after another, and each
operation reads and writes the whole tensor. Here, the function runs once on a few numbers, and a dispatch mode of torch
records its operations. The record is a program that computes one element at a time, so that a compiled loop reads and
writes each tensor once. Methods need no code for this: their torch functions remain the only definition.

A program has three kinds of steps:

- operations on each element of the tensors, which are compiled (`Operation`)
- reductions of whole tensors to one number, such as a sum, which torch computes (`Call`)
- operations on tensors of one element, such as a learned step divided by a number, which torch computes too (`Call`)

Functions that do anything else are not recorded, and torch executes them as they are.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.quant.recorded_operations import ELEMENTWISE, NotRecordable

SAMPLES = 5
"""Number of elements of the tensors with which a function is recorded."""

FULL_TYPES = (torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int16)
"""Types of tensors with a value for each element."""

recording: ContextVar[bool] = ContextVar("recording", default=False)
"""Whether a function is being recorded."""

VIEWS = frozenset({"detach", "alias", "view", "as_strided", "_unsafe_view", "split", "unbind", "slice", "select"})
"""Operations whose results share the memory of their argument."""

FACTORIES = frozenset({"new_empty"})
"""Operations that only make memory. What is written into it later is recorded then."""

OVERWRITING = frozenset({"zero", "fill", "copy"})
"""Operations that write a tensor without reading it."""


class Number(NamedTuple):
    """An operand that is the value of a tensor with one element."""

    slot: int


class Full(NamedTuple):
    """An argument of a `Call` that is a tensor with a value for each element."""

    operation: int


Operand = int | float | Number
"""An operand of an operation: the index of an earlier operation, a constant, or a tensor with one element."""


class Operation(NamedTuple):
    """An operation on each element."""

    name: str
    operands: tuple[Operand, ...]
    dtype: torch.dtype
    stage: int  #: number of reductions, one after another, that must be known before


class Call(NamedTuple):
    """A torch operation with a result of one element. Among its arguments may be `Number` and `Full`."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int
    stage: int  #: see `Operation`

    @property
    def operands(self) -> list["Number | Full"]:
        """Return the arguments that depend on the arguments of the recorded function."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Number | Full)]


class Program(NamedTuple):
    """A recorded function of tensors.

    Slots contain the tensors with one element: first those among the arguments and constants of the function, in their
    order, then the results of the calls.
    """

    operations: list[Operation]
    calls: list[Call]
    results: tuple[Number | Full, ...]
    single: bool  #: whether the function returns one tensor instead of a tuple


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of a function.

    Tensors are identified by their memory, so that views and in-place operations need no special treatment.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, because torch would otherwise import its compiler at the first operation."""
        return False

    def __init__(self, arguments: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.slots: list[int] = []  # the stage of the tensor in each slot
        self.seen: list[Tensor] = []  # keeps the memory of all tensors, so that no address is used twice
        self.values: dict[int, Full | Number] = {}  # by the address of a tensor's first element
        self.memory: set[int] = set()  # addresses of the memory that contains these tensors
        self.inputs: set[int] = set()
        full = 0
        for tensor in (*arguments, *constants):
            if tensor.dim():
                self.set(tensor, Full(self.add("argument", full, dtype=tensor.dtype)))
                full += 1
            else:
                self.set(tensor, self.new_slot())
            self.inputs.add(_memory(tensor))

    def add(self, name: str, *operands: Operand, dtype: torch.dtype = torch.float32) -> int:
        """Append an operation and return its index."""
        read = [] if name == "argument" else operands
        stage = max([0, *(self.slots[o.slot] for o in read if isinstance(o, Number))])
        stage = max([stage, *(self.operations[o].stage for o in read if type(o) is int)])
        self.operations.append(Operation(name, operands, dtype, stage))
        return len(self.operations) - 1

    def new_slot(self, stage: int = 0) -> Number:
        """Return a new place for a tensor with one element."""
        self.slots.append(stage)
        return Number(len(self.slots) - 1)

    def set(self, tensor: Tensor, value: Full | Number) -> None:
        """Remember what computes the content of a tensor."""
        self.seen.append(tensor)
        self.values[tensor.data_ptr()] = value
        self.memory.add(_memory(tensor))

    def get(self, tensor: Tensor) -> Full | Number | None:
        """Return what is known about a tensor, or None if it does not depend on the arguments."""
        if not tensor.numel() or _memory(tensor) not in self.memory:
            return None
        value = self.values.get(tensor.data_ptr())
        whole = tensor.numel() == SAMPLES and tensor.is_contiguous() if isinstance(value, Full) else not tensor.dim()
        if value is None or not whole:
            raise NotRecordable("part of a tensor")
        return value

    def operand(self, value: Any) -> Operand:
        """Return the operand that stands for a tensor or a number."""
        if isinstance(value, Tensor):
            known = self.get(value)
            if isinstance(known, Full):
                return known.operation
            if known is not None:
                return known
            if value.dim():
                raise NotRecordable("a constant tensor")
            return float(value)
        if isinstance(value, int | float):  # also bool
            return float(value)
        raise NotRecordable(f"an operand {value!r}")

    def number(self, value: Any) -> Operand:
        """Return the operand of an arithmetic operation. A condition becomes 1 or 0."""
        operand = self.operand(value)
        if type(operand) is int and self.operations[operand].dtype == torch.bool:
            return self.converted(operand, torch.float32)
        return operand

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute and record one operation."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:  # raised before a number is drawn from torch's generator
            raise NotRecordable("random numbers")
        name = func._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        written = args[0] if in_place else kwargs.pop("out", None)
        operands = [*args[in_place and name in OVERWRITING :], *kwargs.values()]
        known = [value for t in _tensors(operands) if (value := self.get(t)) is not None]
        if known and name in ("_local_scalar_dense", "item", "is_nonzero"):
            raise NotRecordable("the function reads a number of a tensor")
        result = func(*args, **kwargs) if written is None or in_place else func(*args, out=written, **kwargs)
        self.seen.extend(_tensors((*args, result)))
        if name in FACTORIES:
            pass
        elif name in VIEWS:
            for view in _tensors([result]):
                self.get(view)  # raises an error for parts of known tensors
        elif written is not None and _memory(written) in self.inputs:
            raise NotRecordable("the function changes its input")
        elif known or written is not None:
            target = result if written is None else written
            if not isinstance(target, Tensor) or any(isinstance(value, list | tuple) for value in operands):
                raise NotRecordable(name)
            if target.numel() == SAMPLES and target.dim() == 1:
                self.record_elementwise(name, target, args, kwargs)
            elif target.dim() == 0 and written is None:
                self.record_call(func, target, args, kwargs)
            else:
                raise NotRecordable(f"{name} with a result of shape {tuple(target.shape)}")
        return result

    def record_elementwise(self, name: str, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record an operation whose result has a value for each element."""
        make = ELEMENTWISE.get(name)
        if make is None or target.dtype not in FULL_TYPES:
            raise NotRecordable(f"{name} to {target.dtype}")
        try:
            index = make(self, *args, **kwargs)
        except TypeError as error:  # an argument that the table below does not expect
            raise NotRecordable(f"{name}: {error}") from None
        self.set(target, Full(self.converted(index, target.dtype)))

    def converted(self, index: int, dtype: torch.dtype) -> int:
        """Return the operation `index`, converted to a type. bfloat16 is rounded to nearest."""
        kind = self.operations[index].dtype
        if kind == dtype:
            return index
        return self.add("convert", index, dtype=dtype)

    def record_call(self, func: Any, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record an operation whose result has one element."""

        def replaced(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            known = self.get(value)
            return value if known is None else known

        call = Call(func, tuple(map(replaced, args)), {key: replaced(value) for key, value in kwargs.items()}, 0, 0)
        stage = 0
        for operand in call.operands:
            if isinstance(operand, Number):
                stage = max(stage, self.slots[operand.slot])
            elif self.operations[operand.operation].name != "argument":
                stage = max(stage, self.operations[operand.operation].stage + 1)
        slot = self.new_slot(stage)
        self.calls.append(call._replace(slot=slot.slot, stage=stage))
        self.set(target, slot)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values, also those in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def record(function: Callable[..., Any], arguments: Sequence[Tensor], constants: Sequence[Tensor]) -> Program:
    """Return the program that a function executes.

    Args:
        function: a function of `arguments` that returns a tensor or a tuple of tensors.
        arguments: tensors of the types that the function will get. Tensors with one element have no axes, and all
            others are elementwise operands of one shape. Their values do not matter.
        constants: other tensors with one element, without axes, that the function reads.

    Raises:
        NotRecordable: the function does something that a program cannot express.
    """
    samples = [torch.zeros(SAMPLES, dtype=t.dtype) if t.dim() else t.detach().clone() for t in arguments]
    recorder = Recorder(samples, constants)
    token = recording.set(True)
    try:
        with torch.no_grad(), recorder:
            found = function(*samples)
    except NotRecordable:
        raise
    except Exception as error:  # the function may not accept the samples
        raise NotRecordable(repr(error)) from None
    finally:
        recording.reset(token)
    tensors = found if isinstance(found, tuple) else (found,)
    results = []
    for tensor in tensors:
        value = recorder.get(tensor) if isinstance(tensor, Tensor) else None
        if value is None:
            raise NotRecordable("a result that does not depend on the arguments")
        results.append(value)
    return Program(recorder.operations, recorder.calls, tuple(results), not isinstance(found, tuple))
