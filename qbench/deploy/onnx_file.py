"""Writes a network as an ONNX file.

Weights are stored as integer codes. The graph converts codes to floats, by `DequantizeLinear` for equally spaced levels
and by `Gather` for codebooks. Activation quantizers become `QuantizeLinear` and `DequantizeLinear`, or comparisons with
thresholds.
"""

from collections.abc import Callable

from torch import Tensor

from qbench.deploy.about import About
from qbench.deploy.network import Argument, Network, Ref, Step, Stored
from qbench.deploy.onnx_activations import add_quantizer
from qbench.deploy.onnx_functions import CONVERTERS, NoConverter
from qbench.deploy.onnx_graph import OnnxGraph
from qbench.deploy.onnx_weights import add_weights
from qbench.deploy.qonnx_nodes import add_quant_activation
from qbench.deploy.trace import NotExportable

TABLES = (".thresholds", ".levels")
"""Endings of names of tensors that belong to activation quantizers. These tensors become part of the graph's nodes."""


def to_onnx(network: Network, about: About) -> bytes:
    """Return the bytes of an ONNX file with the input `images` (N, C, H, W) and the output `logits` (N, classes).

    Args:
        about: description of the run. Its `form` selects the kind of graph: `onnx`, `int8` for weights and activations
            in 8-bit integers, or `qonnx`.

    Raises:
        NotExportable: a function, a quantizer or weights cannot be converted.
        ConfigError: the package onnx is missing.
    """
    graph = OnnxGraph(about.shape, about.form)
    if graph.int8 and not any(step.function == "quantize" for step in network.steps):
        raise NotExportable(
            "no layer has quantized activations, so nothing can be computed in integers\n"
            "train with bits.a=8 or less, or: qbench export RUN --to onnx"
        )
    stored: dict[str, str | Tensor] = {
        name: tensor if name.endswith(TABLES) else graph.constant(name, tensor.numpy())
        for name, tensor in network.tensors.items()
    }
    stored |= {name: add_weights(graph, name, weight) for name, weight in network.weights.items()}
    results = {-1: "images"}

    def value(argument: Argument) -> object:
        """Return an argument with references replaced by names of graph values or by tensors of a quantizer."""
        if isinstance(argument, Ref):
            if argument.item is not None:
                raise NoConverter("functions that return several results")
            return results[argument.step]
        if isinstance(argument, Stored):
            return stored[argument.name]
        return tuple(map(value, argument)) if type(argument) is tuple else argument

    for i, (step, shape) in enumerate(zip(network.steps, network.shapes(about.shape), strict=True)):
        try:
            results[i] = _add_step(graph, step, value)
        except (NoConverter, TypeError) as reason:
            raise NotExportable(
                f"{step.where or 'the network'}: {about.form} export does not support {reason}\n"
                "try: qbench export RUN --to packed"
            ) from None
        graph.set_shape(results[i], shape)
    try:
        logits = value(network.output)
    except NoConverter as reason:
        raise NotExportable(
            f"{about.form} export does not support {reason}\ntry: qbench export RUN --to packed"
        ) from None
    assert isinstance(logits, str)
    graph.output(logits)
    return graph.file(about)


def _add_step(graph: OnnxGraph, step: Step, value: Callable[[Argument], object]) -> str:
    """Add the nodes of a step, and return the name of the step's result."""
    args, kwargs = map(value, step.args), {key: value(argument) for key, argument in step.kwargs.items()}
    if step.function == "quantize":
        add: Callable[..., str] = add_quant_activation if graph.qonnx else add_quantizer
        return add(graph, *args)
    if step.function not in CONVERTERS:
        raise NoConverter(f"the function {step.function}")
    return CONVERTERS[step.function](graph, *args, **kwargs)
