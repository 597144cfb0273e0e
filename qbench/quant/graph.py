"""Records what a network computes: the calls of its layers, and its graph of operations.

The calls are recorded while the network runs on example images, so the network may contain any Python code. Recording
does not change the results of training. Calls are intercepted without hooks, because torch executes different code for
some modules that have hooks.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

Forward = Callable[..., object]
Interceptor = Callable[[str, nn.Module, Forward, tuple[object, ...], dict[str, object]], object]
"""Function (name, module, its forward function, arguments, keyword arguments) that returns the result of a call.
"""

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""Arguments and keyword arguments of a call."""

IMAGE = "image"
"""The name of the operation that represents the network's input."""

UNKNOWN = "?"
"""The name of all operations that were not recorded, such as NumPy functions."""


class Call(NamedTuple):
    """One call of a module: its name in the network, its first argument and its result."""

    name: str
    input: Tensor
    output: Tensor


class Operation(NamedTuple):
    """One operation of a network: the call of a module or of a torch function.

    Args:
        name: unique name of the operation. It is the name of the module in the network, or the name of the function.
            From the second call on, the number of the call is appended, as in `conv1:2`.
        module: name of the called module, or None for a function.
        kind: class of the module, or name of the function. `own` precedes a class that is not from torch, torchvision
            or qbench. `modified` precedes the class of a module whose function `forward` was replaced, or that has
            forward pre-hooks.
        reads: names of the operations whose results are arguments, in the order of the arguments. `IMAGE` means the
            network's input, and `UNKNOWN` means a tensor of unknown origin.
        parameters: names of the network's parameters and buffers that a function takes as arguments.
    """

    name: str
    module: str | None
    kind: str
    reads: tuple[str, ...]
    parameters: tuple[str, ...] = ()


@contextmanager
def intercepted_calls(model: nn.Module, names: Iterable[str], interceptor: Interceptor) -> Iterator[None]:
    """Call `interceptor` instead of the named modules within a `with` block."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_intercepted_calls_of(name, model.get_submodule(name), interceptor))
        yield


@contextmanager
def _intercepted_calls_of(name: str, module: nn.Module, interceptor: Interceptor) -> Iterator[None]:
    own = module.__dict__.get("forward")  # set by code that replaced the method of this one module

    def forward(*args: object, **kwargs: object) -> object:
        return own(*args, **kwargs) if own else type(module).forward(module, *args, **kwargs)

    module.__dict__["forward"] = lambda *args, **kwargs: interceptor(name, module, forward, args, kwargs)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def recorded_calls(model: nn.Module, names: Sequence[str]) -> Iterator[list[Call]]:
    """Record the calls of the named modules within a `with` block, in execution order.

    Without gradients, tensors are copied, because the network may change them in place later, as ReLU(inplace=True) or
    `out += shortcut` do. With gradients, they are the network's own tensors.
    """
    calls: list[Call] = []

    def kept(tensor: Tensor) -> Tensor:
        return tensor if torch.is_grad_enabled() or isinstance(tensor, nn.Parameter) else tensor.clone()

    def record(
        name: str, module: nn.Module, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        first = kept(next(tensors((args, kwargs))))
        output = forward(*args, **kwargs)
        calls.append(Call(name, first, kept(next(tensors(output)))))
        return output

    with intercepted_calls(model, names, record):
        yield calls


def operations(
    model: nn.Module, images: Tensor, layers: Collection[str] = (), *, training: bool = False
) -> list[Operation]:
    """Return the operations of a network in execution order.

    A module without submodules is one operation. For other modules, the operations inside the module are listed instead
    of the module itself. Parameters and buffers are not operations.

    Args:
        images: images (N, C, H, W) to run. The meta device is allowed.
        layers: names of modules that are treated as one operation although they have submodules.
        training: whether to run the network in training mode, which may change buffers and attributes.
    """
    single = [name for name, module in model.named_modules() if name in layers or not next(module.children(), None)]
    recorder = Recorder(model, images)
    with (
        eval_mode_keeping_rng(model),
        torch.no_grad(),
        intercepted_calls(model, single, recorder.call_module),
        recorder,
    ):
        model.train(training)
        model(images)
    return recorder.operations


def _kind(module: nn.Module) -> str:
    """Return the kind of a module (see `Operation`). A user's class may have the same name as a class of torch."""
    name = type(module).__name__
    if type(module).__module__.partition(".")[0] not in ("torch", "torchvision", "qbench"):
        return f"own {name}"
    changed = "forward" in vars(module) or module._forward_pre_hooks  # operations in forward hooks are recorded
    return f"modified {name}" if changed else name


class Recorder(TorchFunctionMode):
    """Records operations, and which operation computed each tensor.

    `foreign` contains the tensors of unknown origin that operations have read, by `id`.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.operations = [Operation(IMAGE, None, IMAGE, ())]
        self.foreign: dict[int, Tensor] = {}
        self._made_by: dict[int, str] = {id(images): IMAGE}
        self._kept: list[Tensor] = [images]  # keeps the tensors, because an id is unique among living objects only
        named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self._parameters: dict[int, str] = {}
        for name, tensor in named:
            self._parameters.setdefault(id(tensor), name)
        self._kinds = {name: _kind(module) for name, module in model.named_modules()}
        self._calls: Counter[str] = Counter()
        self._paused = False

    def __torch_function__(
        self, func: Forward, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version = None if first is None else first._version
        result = func(*args, **kwargs)
        changed = None if first is None or first._version == version else first  # such as relu(x, inplace=True)
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        kind = name.removesuffix(".__get__").rpartition(".")[2]
        self.add(None, kind, (args, kwargs), result, kwargs.get("out"), changed)
        return result

    def call_module(
        self, name: str, module: nn.Module, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Call a module, and record the call as one operation."""
        if self._paused:
            return forward(*args, **kwargs)
        with self.unrecorded():
            result = forward(*args, **kwargs)
        self.add(name, self._kinds[name], (args, kwargs), result)
        return result

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Record nothing within a `with` block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def add(
        self,
        module: str | None,
        kind: str,
        arguments: Arguments,
        result: object,
        out: object = None,
        changed: object = None,
    ) -> None:
        """Record one operation.

        Args:
            module: name of the called module, or None for a function.
            kind: see `Operation`.
            arguments: the arguments and the keyword arguments.
            result: the result of the call.
            out: what a function got as the argument `out`.
            changed: the argument that a function has written to.
        """
        made = list(tensors((result, out, changed)))
        if not made:
            return  # no tensor was made, as in a query of a tensor's shape
        read = list(tensors(arguments))
        base = kind if module is None else module
        self._calls[base] += 1
        name = base if self._calls[base] == 1 else f"{base}:{self._calls[base]}"
        parameters = tuple(self._parameters[id(t)] for t in read if id(t) in self._parameters)
        reads = tuple(self._made_by.get(id(t), UNKNOWN) for t in read if id(t) not in self._parameters)
        self.foreign |= {id(t): t for t in read if id(t) not in self._parameters and id(t) not in self._made_by}
        self.operations.append(Operation(name, module, kind, reads, parameters))
        self._kept += [*read, *made]
        self._made_by |= {id(t): name for t in made}
        # If the operation wrote into a tensor that it read, all tensors that share memory with it have changed too.
        if written := {storage(t) for t in made if any(t is other for other in read)}:
            self._made_by |= {id(t): name for t in self._kept if storage(t) in written}


def storage(tensor: Tensor) -> int:
    """Return a number that is equal for two tensors only if they share memory. The meta device is allowed."""
    return int(tensor.untyped_storage()._cdata)


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def between(graph: Sequence[Operation], start: str, end: str) -> list[Operation]:
    """Return the operations that depend on `start` and on which `end` depends.

    The result is in execution order.

    Neither `start` nor `end` is included. An operation that reads a tensor of unknown origin is
    assumed to depend on `start`.
    """
    after = {start, UNKNOWN}
    for operation in graph:
        if any(read in after for read in operation.reads):
            after.add(operation.name)
    needed = {end}
    for operation in reversed(graph):
        if operation.name in needed:
            needed |= set(operation.reads)
    inside = (needed & after) - {start, end}
    return [operation for operation in graph if operation.name in inside]


def read_without_call(model: nn.Module, images: Tensor, names: Collection[str], *, training: bool = False) -> list[str]:
    """Return the layers whose weights the network uses without calling the layer.

    Such weights would not be quantized. To find them, the function sets all weights to NaN and runs the network. A
    layer gets its true weights only while the layer itself runs. If other elements of the output are NaN or infinite
    than in a normal run, some weights are used without a call. Any other change of the output counts only if two normal
    runs have the same output.

    Args:
        images: a few images (N, C, H, W), not on the meta device.
        names: layers whose attribute `weight` is a parameter.
        training: whether to run the network in training mode, which may change buffers and
            attributes.
    """
    with eval_mode_keeping_rng(model), torch.no_grad():
        model.train(training)
        plain = _outputs(model, images)
        if not _moves(model, images, names, plain):
            return []
        return [name for name in names if _moves(model, images, [name], plain)]


def _moves(model: nn.Module, images: Tensor, names: Collection[str], plain: Sequence[Tensor]) -> bool:
    """Return whether hiding weights (`_hidden_weights`) shows that they are used without a call.

    `plain` contains the outputs without hidden weights.
    """
    try:
        with _hidden_weights(model, names):
            hidden = _outputs(model, images)
    except Exception:  # code that looks at values, such as a check for NaN
        return True
    if _equal(hidden, plain):
        return False
    finite = [[tensor.isfinite() for tensor in outputs] for outputs in (hidden, plain)]
    return not _equal(*finite) or _equal(plain, _outputs(model, images))


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the tensors in a network's output. Every call uses the same random seed."""
    torch.manual_seed(0)
    return list(tensors(model(images.clone())))


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether all values are equal. NaN counts as equal to NaN."""
    pairs = list(zip(some, others, strict=False))
    same_shapes = len(some) == len(others) and all(x.shape == y.shape for x, y in pairs)
    return same_shapes and all(bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in pairs)


@contextmanager
def _hidden_weights(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Make the weights of layers NaN, except while the layer itself runs."""
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    memory = {name: weight.data for name, weight in weights.items()}  # other tensors of the network may share it
    values = {name: weight.data.clone() for name, weight in weights.items()}

    def call(
        name: str, module: nn.Module, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        weights[name].data = values[name]
        try:
            return forward(*args, **kwargs)
        finally:
            weights[name].data = memory[name]

    try:
        for tensor in memory.values():
            tensor.fill_(torch.nan)
        with intercepted_calls(model, names, call):
            yield
    finally:
        for name, weight in weights.items():
            weight.data = memory[name]
            weight.data.copy_(values[name])


def call_inner_layers(model: nn.Module) -> None:
    """Make transformer encoder layers call their linear layers in evaluation as well as in training.

    In evaluation, torch computes an encoder layer without hooks by one fused function that reads all weights.
    `call_inner_layers` therefore adds a hook that does nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _keep_output not in module._forward_hooks.values():
            module.register_forward_hook(_keep_output)


def _keep_output(module: nn.Module, args: object, output: object) -> None:
    """Do nothing. A forward hook that returns None does not change the module's output."""


@contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Restore the parameters, buffers and attributes of all modules at the end of a `with` block.

    A copy of the network cannot be used instead, because attributes that share memory with a weight would be copied
    too. Objects in attributes are not copied, except for lists, dictionaries and sets.
    """
    attributes = [(module, _shallow(vars(module))) for module in model.modules()]
    values = [(t, t.data, t.detach().clone()) for t in chain(model.parameters(), model.buffers())]
    try:
        yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for tensor, memory, value in values:
            memory.copy_(value)
            tensor.data = memory


def _shallow(attributes: dict[str, object]) -> dict[str, object]:
    """Return a copy of a dictionary in which lists, dictionaries and sets are copies too."""
    return {
        key: copy.copy(value) if isinstance(value, list | dict | set) else value for key, value in attributes.items()
    }


@contextmanager
def eval_mode_keeping_rng(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode within a `with` block.

    On exit, the modes of all modules and the state of the random number generators are restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
