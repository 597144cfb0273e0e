"""Adds quantizers to an ONNX graph as QONNX's nodes Quant and BipolarQuant, for FINN and hls4ml.

Quant computes (clip(round(x / scale + zero)) - zero) * scale, and BipolarQuant computes sign(x) * scale. Both nodes
belong to the operator domain of the package qonnx (github.com/fastmachinelearning/qonnx).
"""

import torch
from torch import Tensor

from qbench.deploy.codes import Encoded
from qbench.deploy.linear import NotLinear, integer_weights
from qbench.deploy.onnx_activations import HALF_STEP, linear_steps, rounds_middles
from qbench.deploy.onnx_functions import NoConverter
from qbench.deploy.onnx_graph import QONNX_DOMAIN, Attribute, OnnxGraph
from qbench.deploy.trace import NotExportable


def add_quant_weights(graph: OnnxGraph, name: str, weight: Encoded) -> str:
    """Add quantized weights as floats and a node that quantizes them again. Return the name of the node's output.

    The node does not change the weights. Tools read the integers and the scale from the node.
    """
    try:
        integers, scale = integer_weights(weight)
    except NotLinear as reason:
        raise NotExportable(
            f"{name.removesuffix('.weight_q')}: qonnx export {reason}\ntry: qbench export RUN --to onnx"
        ) from None
    scale = scale.reshape(-1, *[1] * (integers.dim() - 1)) if len(scale) > 1 else scale[0]
    values = graph.constant(name, (integers * scale).numpy())
    levels = weight.levels
    first, step = (levels.first, levels.step) if levels.form == "steps" else (1 - levels.count, 2)
    last = first + step * (levels.count - 1)
    if (first, last, levels.count) == (-1, 1, 2):
        result = _node(graph, "BipolarQuant", values, graph.constant(name, scale.numpy()))
    else:
        scale = torch.where(scale == 0, 1.0, scale)  # 0 if all weights of a channel are 0
        result = _quant(graph, values, scale, torch.tensor(0.0), first, last, "ROUND")
    graph.set_shape(result, weight.shape)
    return result


def add_quant_activation(graph: OnnxGraph, x: str, thresholds: Tensor, levels: Tensor) -> str:
    """Add the nodes of an activation quantizer, and return the name of its output.

    Raises:
        NoConverter: the quantizer does not round to equally spaced levels.
    """
    linear = linear_steps(thresholds, levels)
    if linear is None:
        raise NoConverter("activation quantizers that do not round to equally spaced levels")
    step, low = linear
    count, shape = levels.shape[-1], [1, -1, *[1] * (len(graph.shape(x)) - 2)] if levels.dim() == 2 else []
    if count == 2 and bool((levels[..., 0] == -levels[..., 1]).all()):
        if bool((thresholds != 0).any()):
            x = graph.node("Sub", x, graph.constant("threshold", thresholds[..., 0].reshape(shape).numpy()))
        return _node(graph, "BipolarQuant", x, graph.constant("scale", levels[..., 1].reshape(shape).numpy()))
    zero = -low / step
    down, up = rounds_middles(thresholds, levels)
    if bool(((zero - zero.round()).abs() < HALF_STEP).all()) and bool((zero.round() == zero.round().max()).all()):
        first, zero = -int(zero.round().max()), torch.tensor(0.0)  # 0 is a level: signed or unsigned integers
    else:
        first, zero = 0, zero.reshape(shape)
    last, step = first + count - 1, step.reshape(shape)
    x = _clipped(graph, x, step, zero, first, last)
    if first >= 0 or not (down or up):
        rounding = "HALF_DOWN" if down else "HALF_UP" if up else "ROUND"
    else:  # HALF_DOWN and HALF_UP depend on the sign
        half = graph.constant("half", (step / 2).numpy())
        x = graph.node("Sub" if down else "Add", x, half)
        rounding = "CEIL" if down else "FLOOR"
    return _quant(graph, x, step, zero, first, last, rounding)


def _clipped(graph: OnnxGraph, x: str, step: Tensor, zero: Tensor, first: int, last: int) -> str:
    """Clip x to the range of the levels if `_quant` would allow integers outside this range."""
    signed, narrow, bits = _integers(first, last)
    lowest = (-(2 ** (bits - 1)) + narrow) if signed else 0
    highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1 - narrow
    if lowest < first:
        x = graph.node("Max", x, graph.constant("low", ((first - zero) * step).numpy()))
    if highest > last:
        x = graph.node("Min", x, graph.constant("high", ((last - zero) * step).numpy()))
    return x


def _integers(first: int, last: int) -> tuple[bool, int, int]:
    """Return the attributes of Quant for integers from `first` to `last`: signed, narrow, and number of bits."""
    if first >= 0:
        bits = max(1, last.bit_length())
        return False, int(last == 2**bits - 2), bits
    bits = max(last, -first - 1).bit_length() + 1
    return True, int(first > -(2 ** (bits - 1))), bits


def _quant(graph: OnnxGraph, x: str, scale: Tensor, zero: Tensor, first: int, last: int, rounding: str) -> str:
    signed, narrow, bits = _integers(first, last)
    inputs = (graph.constant("scale", scale.numpy()), graph.constant("zero", zero.numpy()), graph.floats(float(bits)))
    return _node(graph, "Quant", x, *inputs, signed=int(signed), narrow=narrow, rounding_mode=rounding)


def _node(graph: OnnxGraph, operator: str, *inputs: str, **attributes: Attribute) -> str:
    return graph.node(operator, *inputs, domain=QONNX_DOMAIN, **attributes)
