"""Finds activation functions that input quantizers replace, and bypasses them.

`feeds` maps the name of an activation module to the layers that read its output. It contains an activation only if
nothing else reads the output. A network can declare `feeds` as an attribute. If the attribute is missing
and the method needs it, qbench runs the network to find these layers.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.quant.graph import IMAGE, UNKNOWN, Operation, operations, state_restored
from qbench.quant.image import REARRANGING
from qbench.quant.layers import BypassedActivation
from qbench.quant.method import Method, Unsupported

Feeds = Mapping[str, tuple[str, ...]]
"""Maps the name of an activation to the names of the layers that read its output."""

COMMUTING = REARRANGING | {
    "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d",
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "dropout", "dropout2d",
    "max_pool1d", "max_pool2d", "max_pool3d",
}  # fmt: skip
"""torch functions and modules that commute with ReLU."""

logger = logging.getLogger("qbench")

FUNCTIONS = ("relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "relu6", "hardtanh")
"""torch functions that networks use in place of `nn.ReLU`. They cannot be bypassed, because they are not modules."""


class TracedFeeds(NamedTuple):
    """The activations that quantizers can replace.

    For each layer that reads none of these activations, `reasons` says why no activation before the layer can be
    replaced.
    """

    feeds: Feeds
    reasons: Mapping[str, str]


def feeds(model: nn.Module) -> Feeds:
    """Return the network's attribute `feeds`, or {} if the network has no attribute of this name and form."""
    declared = getattr(model, "feeds", None)
    if not isinstance(declared, Mapping) or not all(isinstance(names, tuple | list) for names in declared.values()):
        return {}
    return {str(name): tuple(names) for name, names in declared.items()}


def trace_feeds(model: nn.Module, example: Tensor, layers: Collection[str]) -> TracedFeeds:
    """Run a network to find the layers that each activation feeds.

    Here, an activation is a module of the class `nn.ReLU`. The network may call the module several times. Operations
    that commute with ReLU, such as max pooling, may be between an activation and a layer. If something else reads an
    activation in evaluation or in training, the activation cannot be replaced.

    Args:
        example: one batch of images (N, C, H, W). The meta device is allowed.
        layers: the names of the layers.
    """
    with state_restored(model):
        graph = operations(model, example, layers)
        in_training = _operations_in_training(model, example, layers)
    if any(UNKNOWN in operation.reads for operation in (*graph, *in_training)):
        return TracedFeeds(
            {},
            dict.fromkeys(
                layers,
                "the network reads values of unknown origin (from tensors that are not buffers, or from NumPy)",
            ),
        )
    found, others = _readers_of_activations(graph, layers)
    _, others_in_training = _readers_of_activations(in_training, layers)
    for module, reason in others_in_training.items():
        if found.pop(module, None):
            others[module] = f"in training, {reason}"
    fed = {layer for read in found.values() for layer in read}
    return TracedFeeds(found, {layer: _reason(graph, layer, others) for layer in layers if layer not in fed})


def _operations_in_training(model: nn.Module, example: Tensor, layers: Collection[str]) -> list[Operation]:
    """Return the operations of a network in training mode, or [] if it needs more than images in this mode."""
    images = torch.cat([example, example]) if len(example) == 1 else example  # batch normalization needs two values
    try:
        return operations(model, images, layers, training=True)
    except Exception as error:
        logger.warning(
            "the network does not run on images alone in training mode (%s: %s); qbench therefore did not check "
            "whether other code in training uses the outputs of activation functions that quantizers replace",
            type(error).__name__, str(error).partition("\n")[0],
        )  # fmt: skip
        return []


def _readers_of_activations(
    graph: Sequence[Operation], layers: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return two dictionaries whose keys are names of activations.

    If only layers read an activation, the first dictionary contains the names of these layers. Otherwise, the second
    dictionary contains a text that says what else reads the activation.
    """
    activations = [operation for operation in graph if operation.module and operation.kind == "ReLU"]
    rectified = _rectified(graph, [operation.name for operation in activations])
    readers = {operation.name: list(_readers(graph, operation.name, rectified)) for operation in activations}
    found: dict[str, tuple[str, ...]] = {}
    others: dict[str, str] = {}
    for module in dict.fromkeys(operation.module for operation in activations if operation.module):
        calls = [operation.name for operation in activations if operation.module == module]
        read_by = [reader for call in calls for reader in readers[call]]
        also = [reader for reader in read_by if reader.module not in layers]
        if also or not read_by:
            what = ", ".join(dict.fromkeys(_in_words(reader) for reader in also)) or "the output"
            shared = f"is called {len(calls)} times, and " if len(calls) > 1 else ""
            others[module] = f"{module} {shared}also feeds {what}"
        else:
            found[module] = tuple(dict.fromkeys(reader.module for reader in read_by if reader.module))
    return found, others


def _rectified(graph: Sequence[Operation], activations: Sequence[str]) -> set[str]:
    """Return the operations whose results come only from ReLUs, through operations that commute with ReLU."""
    found = set(activations)
    for operation in graph:
        if operation.kind in COMMUTING and operation.reads and found.issuperset(operation.reads):
            found.add(operation.name)
    return found


def _readers(graph: Sequence[Operation], name: str, rectified: Collection[str]) -> Iterator[Operation]:
    """Yield the operations that read the result of `name`, directly or through operations that commute with ReLU.

    An operation that also reads a tensor without ReLU, such as a concatenation, does not count as commuting.
    """
    passed = {name}
    for operation in graph:
        if passed.isdisjoint(operation.reads):
            continue
        if operation.name in rectified:
            passed.add(operation.name)
        else:
            yield operation


def _reason(graph: Sequence[Operation], layer: str, others: Mapping[str, str]) -> str:
    """Return the reason, as text, why no activation before a layer can be replaced."""
    by_name = {operation.name: operation for operation in graph}
    ahead = [read for operation in graph if operation.module == layer for read in operation.reads]
    while ahead:
        operation = by_name[ahead.pop()]
        if reason := others.get(operation.module or ""):
            return reason
        if operation.kind in FUNCTIONS:
            return f"the layer reads the result of the function {operation.kind}, not of a module nn.ReLU"
        if operation.kind not in COMMUTING and operation.name != IMAGE:
            return f"the layer reads the result of {_in_words(operation)}, not of a module nn.ReLU"
        ahead += operation.reads
    return "the layer reads no nn.ReLU"


def _in_words(operation: Operation) -> str:
    return f"{operation.kind} {operation.module}" if operation.module else operation.kind


def bypass_activations(
    method: Method, model: nn.Module, assigned: Mapping[str, Bits], image: Collection[str], act: str,
    example: Tensor | None,
) -> None:  # fmt: skip
    """Bypass the activation functions that quantizers replace.

    An activation function is replaced if every layer that reads its output has an input quantizer. If activation
    functions must be replaced and the network has no attribute `feeds`, the network runs on `example` to find the
    layers.

    Args:
        assigned: the widths of the layers, by name.
        image: the layers that read the image.
        act: see `install`.
        example: see `install`.

    Raises:
        Unsupported: `act` contradicts the method, or a required replacement is not possible.
    """
    needs = method.requires.act
    if {act, needs} == {"keep", "fused"} and method.bits.a < FLOAT:
        raise Unsupported(
            f"{method.name} requires act={needs} for the activation functions before its quantizers; got act={act}"
        )
    if method.bits.a == FLOAT or "keep" in (act, needs):
        return
    reasons: Mapping[str, str] = {}
    readers_of = feeds(model)
    if "fused" not in (act, needs):  # of the other activation functions, the quantizer includes none
        readers_of = {name: read for name, read in readers_of.items() if type(model.get_submodule(name)) is nn.ReLU}
    if "fused" in (act, needs) and not readers_of and example is not None:
        traced, reasons = trace_feeds(model, example, assigned)
        readers_of = traced
    _check_feeds(method, model, readers_of, assigned, image, act, reasons)
    for name, readers in readers_of.items():
        quantized = [reader for reader in readers if assigned[reader].a < FLOAT]
        if len(quantized) == len(readers):
            _bypass(model, model.get_submodule(name), readers)
        elif quantized and needs == "fused":
            float_readers = ", ".join(sorted(set(readers) - set(quantized)))
            raise Unsupported(
                f"the activation {name} feeds {quantized[0]} (quantized) and {float_readers} (float)\n"
                f"set the same bits for all these layers, or give each layer its own activation"
            )


def _bypass(model: nn.Module, activation: nn.Module, readers: Sequence[str]) -> None:
    """Replace an activation module by a `BypassedActivation`, at every place where the network uses the module."""
    bypassed = BypassedActivation(activation, readers)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is activation:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, bypassed)


def _check_feeds(
    method: Method, model: nn.Module, readers_of: Feeds, assigned: Mapping[str, Bits], image: Collection[str],
    act: str, reasons: Mapping[str, str],
) -> None:  # fmt: skip
    """Raise `Unsupported` if `feeds` does not contain all activation functions that must be replaced."""
    needs = method.requires.act
    if not readers_of and not reasons and "fused" in (needs, act):
        raise Unsupported(
            f"{method.name} replaces the activation function, but {type(model).__name__} has no attribute "
            f"`feeds`\ncall install with example=, one batch of images, to find which layers each activation feeds"
        )
    fed = {reader for readers in readers_of.values() for reader in readers}
    if unknown := {*readers_of, *fed} - dict(model.named_modules()).keys():
        raise Unsupported(f"{type(model).__name__}.feeds names modules that do not exist: {', '.join(sorted(unknown))}")
    unfed = [name for name, bits in assigned.items() if bits.a < FLOAT and name not in fed and name not in image]
    if reasons and unfed and (needs == "fused" or not readers_of):
        more = f" and {len(unfed) - 1} more" if len(unfed) > 1 else ""
        raise Unsupported(
            f"{method.name} replaces the activation function, which is not possible for {unfed[0]}{more}: "
            f"{reasons[unfed[0]]}\ngive each of these layers its own nn.ReLU, or keep its input float: "
            f"'layers.rules={{{unfed[0]}: w{method.bits.w}}}'"
        )
    if needs == "fused" and unfed:
        raise Unsupported(
            f"{method.name} replaces the activation function, but {unfed[0]} has no activation function of its own\n"
            f"leave the activations of this layer in float"
        )
