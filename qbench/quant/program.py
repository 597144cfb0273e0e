"""Defines programs of elementwise operations, and the builder with which `recording.py` makes them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLES = 5
"""Number of elements of the tensors with which a function is recorded."""

FULL_TYPES = (torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int16)
"""Types of tensors with a value for each element."""


class NotRecordable(Exception):
    """Raised if a function cannot be expressed as a program of the supported operations."""


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
    stage: int  #: number of successive reductions whose results must be known first


class Call(NamedTuple):
    """A torch operation with a result of one element. Its arguments may contain `Number` and `Full` objects."""

    function: Callable[..., Tensor]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    slot: int
    stage: int  #: see `Operation`

    @property
    def operands(self) -> list["Number | Full"]:
        """Return the arguments that depend on the arguments of the recorded function."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Number | Full)]


class Program(NamedTuple):
    """A recorded function of tensors.

    Each slot contains a tensor with one element. The first slots contain the one-element arguments and constants of the
    function, in order. The other slots contain the results of the calls.
    """

    operations: list[Operation]
    calls: list[Call]
    results: tuple[Number | Full, ...]
    single: bool  #: whether the function returns one tensor instead of a tuple


class Builder:
    """Builds a program, and remembers which of its operations computes each tensor.

    Tensors are identified by their memory, so that views and in-place operations need no special treatment.
    """

    def __init__(self, arguments: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
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
            self.inputs.add(memory_of(tensor))

    def add(self, name: str, *operands: Operand, dtype: torch.dtype = torch.float32) -> int:
        """Append an operation and return its index."""
        read = [] if name == "argument" else operands
        stage = max([0, *(self.slots[o.slot] for o in read if isinstance(o, Number))])
        stage = max([stage, *(self.operations[o].stage for o in read if type(o) is int)])
        self.operations.append(Operation(name, operands, dtype, stage))
        return len(self.operations) - 1

    def new_slot(self, stage: int = 0) -> Number:
        """Return a new slot for a tensor with one element."""
        self.slots.append(stage)
        return Number(len(self.slots) - 1)

    def set(self, tensor: Tensor, value: Full | Number) -> None:
        """Remember the operation or slot that contains the values of a tensor."""
        self.seen.append(tensor)
        self.values[tensor.data_ptr()] = value
        self.memory.add(memory_of(tensor))

    def get(self, tensor: Tensor) -> Full | Number | None:
        """Return the operation or slot of a tensor, or None if the tensor does not depend on the arguments."""
        if not tensor.numel() or memory_of(tensor) not in self.memory:
            return None
        value = self.values.get(tensor.data_ptr())
        whole = tensor.numel() == SAMPLES and tensor.is_contiguous() if isinstance(value, Full) else not tensor.dim()
        if value is None or not whole:
            raise NotRecordable("part of a tensor")
        return value

    def operand(self, value: object) -> Operand:
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

    def number(self, value: object) -> Operand:
        """Return the operand of an arithmetic operation. A bool becomes 1 or 0."""
        operand = self.operand(value)
        if type(operand) is int and self.operations[operand].dtype == torch.bool:
            return self.converted(operand, torch.float32)
        return operand

    def converted(self, index: int, dtype: torch.dtype) -> int:
        """Return the index of the result of operation `index`, converted to a type. bfloat16 is rounded to nearest."""
        kind = self.operations[index].dtype
        if kind == dtype:
            return index
        return self.add("convert", index, dtype=dtype)


def memory_of(tensor: Tensor) -> int:
    """Return the address of the memory that contains a tensor."""
    return tensor.untyped_storage().data_ptr()
