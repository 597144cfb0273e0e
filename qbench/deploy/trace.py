"""Converts a quantized network to a traced network, by recording the torch functions that it calls.

Quantized weights become codes, and input quantizers become thresholds and levels. All other Python code of the model
and the method is replaced by the torch functions that it calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isfunction, signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.bits import FLOAT
from qbench.deploy.codes import Encoded, NotEncodable, encode
from qbench.deploy.network import FUNCTIONS, Argument, Batch, Network, Ref, Step, Stored, refs
from qbench.deploy.steps import NotSteps, step_function
from qbench.errors import ConfigError
from qbench.quant.graph import Arguments, Forward, Recorder, eval_mode_keeping_rng, intercepted_calls, storage, tensors
from qbench.quant.layers import QLayer, quantized_layers

NO_EFFECT = ("inplace", "_stacklevel")
"""Names of arguments that do not change the result of a function."""

READS_VALUES = frozenset({
    "__bool__", "__float__", "__int__", "__index__", "__contains__", "__array__", "__format__", "__repr__", "item",
    "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique",
    "unique_consecutive",
})  # fmt: skip
"""Functions that pass values of a tensor to Python code, also in the shape of their result.

The use of such values in Python cannot be recorded.
"""

MAX_BITS = 8
"""Largest bit width of quantized weights and activations in an exported file."""

UNCHANGED = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "detach", "data", "view_as"})
"""Functions that return their first argument unchanged in evaluation mode."""

CREATES = frozenset({"new_full", "new_zeros", "new_ones", "new_tensor", "zeros_like", "ones_like", "full_like"})
"""Functions whose result does not depend on the values of their tensor arguments."""


class NotExportable(ConfigError):
    """Raised if a network cannot be exported. The message names the layer, the reason and an alternative."""


@dataclass
class _Program:
    """The recorded steps and the tensors that the steps read."""

    steps: list[Step] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # name -> layer, its quantized weights


def trace(model: nn.Module, images: Tensor) -> Network:
    """Return the traced network of a quantized network.

    The function runs the network on two batches of different sizes. An argument that differs between the two runs must
    be a size that is proportional to the number of images.

    Args:
        images: at least 5 normalized images (N, C, H, W) on the CPU.

    Raises:
        NotExportable: a bit width, a quantizer or a function of the network cannot be exported.
    """
    layers = quantized_layers(model)
    _check(layers)
    batches = images[:2], images[2:5]
    (first, output), (second, other_output) = (_record(model, batch, layers) for batch in batches)
    if [step.function for step in first.steps] != [step.function for step in second.steps] or output != other_output:
        raise NotExportable(
            "the network calls different functions for different images; such a network cannot be exported"
        )
    steps = []
    for step, other in zip(first.steps, second.steps, strict=True):
        kwargs = {key: _merged(value, other.kwargs[key], step) for key, value in step.kwargs.items()}
        steps.append(step._replace(args=_merged_tuple(step.args, other.args, step), kwargs=kwargs))
    for name, tensor in first.tensors.items():
        if not _same(tensor, second.tensors.get(name)):
            raise NotExportable(f"{name}: depends on the images, but is not computed by torch functions")
    weights = {name: _encode(layer, layers[layer], weight) for name, (layer, weight) in first.weights.items()}
    return _live(steps, output, first.tensors, weights)


def _check(layers: Mapping[str, QLayer]) -> None:
    """Raise `NotExportable` for layers whose bit widths or state cannot be exported."""
    for name, layer in layers.items():
        for key, what, width in (("w", "weights", layer.bits.w), ("a", "activations", layer.bits.a)):
            if MAX_BITS < width < FLOAT:
                raise NotExportable(
                    f"{name} has {width}-bit {what}; exported files have at most {MAX_BITS} bits\n"
                    f"train with bits.{key}={MAX_BITS} or less, or bits.{key}={FLOAT}"
                )
        if not layer.weight_q.complete:
            raise NotExportable(f"{name}: some weights are still float\nexport the finished run")


def _encode(name: str, layer: QLayer, weight: Tensor) -> Encoded:
    try:
        return encode(layer.weight_q, layer.weight.detach(), weight)
    except NotEncodable as reason:
        raise NotExportable(f"{name}: the weights cannot be stored as codes: {reason}") from None


class _Tracer(Recorder):
    """Records steps. The arguments of a step contain references instead of tensors."""

    def __init__(self, model: nn.Module, images: Tensor, layers: Mapping[str, QLayer]) -> None:
        super().__init__(model, images)
        self.program, self._layers, self._where = _Program(), layers, [""]
        # layers read values of their input only to test whether it is finite
        self._checking = {name for name, module in model.named_modules() if isinstance(module, QLayer)}
        self._values: dict[int, Ref | Stored] = {id(images): Ref(-1)}
        self._stale: set[int] = set()  # tensors whose values have changed because they share memory with another one
        self._names = {
            id(tensor): name
            for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        }

    def call_container(
        self, name: str, module: nn.Module, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Call a module, and record the functions that it calls."""
        self._where.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            self._where.pop()

    def call_output(
        self, name: str, module: nn.Module, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Call an output quantizer.

        If the result depends on the layer's input, the functions that the quantizer calls are recorded. Otherwise, the
        quantizer itself is recorded.
        """
        y, x = args
        assert isinstance(x, Tensor)
        with self.unrecorded():
            one, other = forward(y, x), forward(y, 2 * x + 1)
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        single = torch.equal(one, other)
        return (self.call_module if single else self.call_container)(name, module, forward, args, kwargs)

    def add(
        self,
        module: str | None,
        kind: str,
        arguments: Arguments,
        result: object,
        out: object = None,
        changed: object = None,
    ) -> None:
        """Record one call of a function or of a quantizer."""
        super().add(module, kind, arguments, result, out, changed)
        args, kwargs = arguments
        if module is not None:
            x = args[0]
            assert isinstance(x, Tensor)
            assert isinstance(result, Tensor)
            self._add_quantizer(module, x, result)
            return
        args = _without_inplace(kind, args)
        if kind == "__getitem__" and isinstance(args[0], Tensor):
            args = args[0], _without_ellipsis(args[1], args[0].dim())
        if (
            kind in READS_VALUES
            and self._where[-1] not in self._checking
            and any(True for _ in refs(self._arguments(args)))
        ):
            raise NotExportable(
                f"{self._where[-1] or 'the network'}: reads values of a tensor that depends on the images ({kind})\n"
                "such a network may compute differently for other images, so it cannot be exported"
            )
        if kind in ("__getitem__", "where") and _selects_by_value(kind, args, self._arguments):
            raise NotExportable(
                f"{self._where[-1] or 'the network'}: the shape of a result depends on the images ({kind})\n"
                "such a network may compute differently for other images, so it cannot be exported"
            )
        if not list(tensors(result)):
            if changed is not None and any(True for _ in refs(self._arguments(args))):
                raise NotExportable(
                    f"{self._where[-1] or 'the network'}: assigns to a part of a tensor ({kind})\n"
                    "use torch.where or torch.cat"
                )
            return
        converted = tuple(map(self._arguments, args)), {key: self._arguments(value) for key, value in kwargs.items()}
        if kind in CREATES or not next(refs((converted[0], tuple(converted[1].values()))), None):
            return  # the result does not depend on the image, so it is a constant
        function = kind if kind.endswith("__") else kind.removesuffix("_")
        function = {"__getitem__": "getitem", "__rsub__": "rsub"}.get(function, function)
        value: Ref | Stored
        first = converted[0][0] if converted[0] else None
        if isinstance(first, Ref) and (function in UNCHANGED or (result is args[0] and changed is None)):
            value = first
        else:
            for key in NO_EFFECT:
                converted[1].pop(key, None)
            value = self._add_step("out=" if out is not None else function, *converted)
        if isinstance(result, Tensor):
            self._values[id(result)] = value
        else:
            assert isinstance(value, Ref)
            assert isinstance(result, tuple | list)
            self._values |= {id(t): value._replace(item=i) for i, t in enumerate(result) if isinstance(t, Tensor)}
        if isinstance(changed, Tensor):
            self._values[id(changed)] = value
            sharing = {id(t) for t in self._kept if storage(t) == storage(changed)} & self._values.keys()
            self._stale = (self._stale | sharing) - {id(changed), id(result)}

    def _add_step(self, function: str, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Ref:
        self.program.steps.append(Step(function, args, kwargs, self._where[-1]))
        return Ref(len(self.program.steps) - 1)

    def _add_quantizer(self, module: str, x: Tensor, result: Tensor) -> None:
        name, _, slot = module.rpartition(".")
        if slot == "weight_q" and self._layers[name].bits.w == FLOAT:
            return  # the quantizer returns the float weights themselves
        if slot == "weight_q":
            weight = module  # the name of the quantizer, not of the latent weights
            self.program.weights[weight] = name, result
            self._values[id(result)] = Stored(weight)
            return
        value = self._arguments(x)
        if not isinstance(value, Ref):
            raise NotExportable(f"{name}: the input is not computed from the images by torch functions")
        quantizer = self._layers[name].get_submodule(slot)
        function: Callable[[Tensor], Tensor] = quantizer if slot == "input_q" else lambda y: quantizer(y, y)
        try:
            with self.unrecorded():
                if torch.equal(result, x) and all(torch.equal(function(y), y) for y in (2 * x + 0.3, -x - 0.1, 99 * x)):
                    self._values[id(result)] = value  # the quantizer returns its input, as quantizers of gradients do
                    return
                thresholds, levels = step_function(function, x)
        except NotSteps as reason:
            raise NotExportable(f"{name}: {reason}\nexport needs an activation quantizer with thresholds") from None
        self.program.tensors |= {f"{module}.thresholds": thresholds, f"{module}.levels": levels}
        stored = (Stored(f"{module}.thresholds"), Stored(f"{module}.levels"))
        self._where.append(name)
        self._values[id(result)] = self._add_step("quantize", (value, *stored), {})
        self._where.pop()

    def _arguments(self, value: object) -> Argument:
        """Return an argument with references in place of tensors."""
        if isinstance(value, Tensor):
            if id(value) in self._stale:
                raise NotExportable(
                    f"{self._where[-1] or 'the network'}: reads a tensor whose memory was changed in place through "
                    "another tensor, such as a view\nuse functions that return a new tensor"
                )
            if id(value) not in self._values:
                name = self._names.get(id(value)) or f"constant{len(self.program.tensors)}"
                self.program.tensors[name] = value.detach()
                self._values[id(value)] = Stored(name)
            return self._values[id(value)]
        if isinstance(value, tuple | list):
            return tuple(map(self._arguments, value))
        return value


def _selects_by_value(kind: str, args: tuple[object, ...], reference: Callable[[object], Argument]) -> bool:
    """Return whether a function selects elements by a mask that depends on the images: `x[mask]` or `where(mask)`."""
    index = args[1] if kind == "__getitem__" else args[0] if len(args) == 1 else None
    masks = [t for t in tensors(index) if t.dtype in (torch.bool, torch.uint8) or kind == "where"]
    return any(True for mask in masks for _ in refs((reference(mask),)))


def _without_inplace(kind: str, args: tuple[object, ...]) -> tuple[object, ...]:
    """Return the positional arguments of a function in torch.nn.functional without `inplace`, which is the last one."""
    function = getattr(F, kind, None)
    parameters = list(signature(function).parameters) if isfunction(function) else []
    return args[: parameters.index("inplace")] if "inplace" in parameters else args


def _without_ellipsis(index: object, axes: int) -> object:
    """Return an index of a tensor with slices in place of an Ellipsis."""
    parts = index if isinstance(index, tuple) else (index,)
    place = next((i for i, part in enumerate(parts) if part is Ellipsis), None)
    if place is None:
        return index
    given = sum(part is not None for part in parts) - 1
    return *parts[:place], *[slice(None)] * (axes - given), *parts[place + 1 :]


def _record(model: nn.Module, images: Tensor, layers: Mapping[str, QLayer]) -> tuple[_Program, Ref]:
    tracer = _Tracer(model, images, layers)
    single = {f"{name}.{slot}" for name in layers for slot in ("weight_q", "input_q")}
    outputs = {f"{name}.output_q" for name in layers}
    others = [name for name, _ in model.named_modules() if name not in single | outputs]
    with (
        eval_mode_keeping_rng(model),
        torch.no_grad(),
        intercepted_calls(model, sorted(single), tracer.call_module),
        intercepted_calls(model, sorted(outputs), tracer.call_output),
        intercepted_calls(model, others, tracer.call_container),
        tracer,
    ):
        result = model(images)
    output = tracer._values.get(id(result)) if isinstance(result, Tensor) else None
    if not isinstance(output, Ref) or result.dim() != 2 or len(result) != len(images):
        raise NotExportable(
            "the output of the network must be one tensor of logits (N, classes) that depends on the images"
        )
    return tracer.program, output


def _merged(first: Argument, second: Argument, step: Step) -> Argument:
    """Combine the arguments for batches of 2 and 3 images into one argument that is valid for all batch sizes."""
    if isinstance(first, Ref | Stored):
        if first == second:
            return first
    elif isinstance(first, tuple) and isinstance(second, tuple):
        return _merged_tuple(first, second, step)
    elif first is second or (type(first) is type(second) and first == second):
        return first
    elif isinstance(first, int) and isinstance(second, int) and first % 2 == 0 and first // 2 * 3 == second:
        return Batch(first // 2)
    raise _depends_on_images(step)


def _merged_tuple(first: tuple[Argument, ...], second: tuple[Argument, ...], step: Step) -> tuple[Argument, ...]:
    if len(first) != len(second):
        raise _depends_on_images(step)
    return tuple(_merged(one, other, step) for one, other in zip(first, second, strict=True))


def _depends_on_images(step: Step) -> NotExportable:
    return NotExportable(
        f"{step.where or 'the network'}: an argument of {step.function} depends on the images\n"
        "only sizes may depend on the number of images"
    )


def _same(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.shape == second.shape and torch.equal(first, second)


def _live(steps: Sequence[Step], output: Ref, found: Mapping[str, Tensor], weights: Mapping[str, Encoded]) -> Network:
    """Return a network with only the steps on which the output depends.

    Raises:
        NotExportable: one of these steps calls a function that files cannot describe.
    """
    needed = {output.step}
    for i in reversed(range(len(steps))):
        if i in needed:
            needed |= {ref.step for ref in refs((steps[i].args, tuple(steps[i].kwargs.values())))}
    number = {-1: -1} | {old: new for new, old in enumerate(sorted(needed - {-1}))}
    kept = [_renumbered(steps[i], number) for i in sorted(needed - {-1})]
    for step in kept:
        if step.function not in FUNCTIONS:
            raise NotExportable(f"{step.where or 'the network'}: export does not know the function {step.function}")
    names = {stored.name for step in kept for stored in _stored((step.args, tuple(step.kwargs.values())))}
    for name in names & found.keys():
        if found[name].dtype != torch.float32:
            raise NotExportable(f"{name} is {found[name].dtype}; exported networks compute in float32")
    return Network(
        kept, Ref(number[output.step], output.item), {name: found[name] for name in sorted(names & found.keys())},
        {name: weight for name, weight in weights.items() if name in names},
    )  # fmt: skip


def _renumbered(step: Step, number: Mapping[int, int]) -> Step:
    def renumber(argument: Argument) -> Argument:
        if isinstance(argument, Ref):
            return argument._replace(step=number[argument.step])
        if isinstance(argument, tuple) and not isinstance(argument, Stored | Batch):
            return tuple(map(renumber, argument))
        return argument

    return step._replace(args=tuple(map(renumber, step.args)), kwargs={k: renumber(v) for k, v in step.kwargs.items()})


def _stored(argument: Argument) -> Iterator[Stored]:
    if isinstance(argument, Stored):
        yield argument
    elif isinstance(argument, tuple) and not isinstance(argument, Ref | Batch):
        for item in argument:
            yield from _stored(item)
