"""Records elementwise functions of tensors as programs, from which `native_code.py` makes machine code.

A function such as the forward pass of a quantizer applies several torch operations one after another, and each
operation reads and writes the whole tensor. Here, the function runs once on a few numbers, and a dispatch mode of torch
records its operations. The record is a program that computes one element at a time, so that a compiled loop reads and
writes each tensor once. Methods need no additional code, because their torch functions are recorded as they are.

A program has three kinds of steps:

- operations on each element of the tensors, which are compiled (`Operation`)
- reductions of whole tensors to one number, such as a sum, which torch computes (`Call`)
- operations on tensors of one element, such as a learned step divided by a number, which torch computes too (`Call`)

A function with any other step is not recorded. torch executes such a function.
"""

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.quant.program import FULL_TYPES, SAMPLES, Builder, Call, Full, NotRecordable, Number, Program, memory_of
from qbench.quant.recorded_operations import ELEMENTWISE

recording: ContextVar[bool] = ContextVar("recording", default=False)
"""Whether a function is being recorded."""

VIEWS = frozenset({"detach", "alias", "view", "as_strided", "_unsafe_view", "split", "unbind", "slice", "select"})
"""Operations whose results share the memory of their argument."""

FACTORIES = frozenset({"new_empty"})
"""Operations that only allocate memory. Later operations that write to this memory are recorded."""

OVERWRITING = frozenset({"zero", "fill", "copy"})
"""Operations that write a tensor without reading it."""


class TorchOperation(Protocol):
    """An operation that torch executes, such as `aten.add.Tensor`. The class of operations is private in torch."""

    tags: Sequence[torch.Tag]
    _schema: torch.FunctionSchema

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """Execute the operation."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of a function."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, because torch would otherwise import its compiler at the first operation."""
        return False

    def __init__(self, builder: Builder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder = builder

    def __torch_dispatch__(
        self,
        func: TorchOperation,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Execute and record one operation."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:  # raised before a number is drawn from torch's generator
            raise NotRecordable("random numbers")
        name = func._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        written = args[0] if in_place else kwargs.pop("out", None)
        operands = [*args[in_place and name in OVERWRITING :], *kwargs.values()]
        known = [value for t in _tensors(operands) if (value := self.builder.get(t)) is not None]
        if known and name in ("_local_scalar_dense", "item", "is_nonzero"):
            raise NotRecordable("the function reads the value of a tensor as a Python number")
        result = func(*args, **kwargs) if written is None or in_place else func(*args, out=written, **kwargs)
        self.builder.seen.extend(_tensors((*args, result)))
        if name in FACTORIES:
            pass
        elif name in VIEWS:
            for view in _tensors([result]):
                self.builder.get(view)  # raises an error for parts of known tensors
        elif isinstance(written, Tensor) and memory_of(written) in self.builder.inputs:
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

    def record_elementwise(
        self, name: str, target: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Record an operation whose result has a value for each element."""
        make = ELEMENTWISE.get(name)
        if make is None or target.dtype not in FULL_TYPES:
            raise NotRecordable(f"{name} to {target.dtype}")
        try:
            index = make(self.builder, *args, **kwargs)
        except TypeError as error:  # an argument that the function in ELEMENTWISE does not accept
            raise NotRecordable(f"{name}: {error}") from None
        self.builder.set(target, Full(self.builder.converted(index, target.dtype)))

    def record_call(
        self, func: TorchOperation, target: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Record an operation whose result has one element."""

        def replaced(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            known = self.builder.get(value)
            return value if known is None else known

        call = Call(func, tuple(map(replaced, args)), {key: replaced(value) for key, value in kwargs.items()}, 0, 0)
        stage = 0
        for operand in call.operands:
            if isinstance(operand, Number):
                stage = max(stage, self.builder.slots[operand.slot])
            elif self.builder.operations[operand.operation].name != "argument":
                stage = max(stage, self.builder.operations[operand.operation].stage + 1)
        slot = self.builder.new_slot(stage)
        self.builder.calls.append(call._replace(slot=slot.slot, stage=stage))
        self.builder.set(target, slot)


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """Return the tensors among `values`, including tensors in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def record(function: Callable[..., object], arguments: Sequence[Tensor], constants: Sequence[Tensor]) -> Program:
    """Return the program that a function executes.

    Args:
        function: a function of `arguments` that returns a tensor or a tuple of tensors.
        arguments: tensors of the types that the function will get. Tensors with one element have no axes. All other
            tensors have the same shape. The values do not matter.
        constants: other tensors with one element, without axes, that the function reads.

    Raises:
        NotRecordable: the function does something that a program cannot express.
    """
    samples = [torch.zeros(SAMPLES, dtype=t.dtype) if t.dim() else t.detach().clone() for t in arguments]
    builder = Builder(samples, constants)
    token = recording.set(True)
    try:
        with torch.no_grad(), _Recorder(builder):
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
        value = builder.get(tensor) if isinstance(tensor, Tensor) else None
        if value is None:
            raise NotRecordable("a result that does not depend on the arguments")
        results.append(value)
    return Program(builder.operations, builder.calls, tuple(results), not isinstance(found, tuple))
