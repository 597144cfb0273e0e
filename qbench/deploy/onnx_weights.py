"""Adds quantized weights to an ONNX graph, as integer codes and nodes that convert the codes to floats."""

import numpy as np
import torch

from qbench.deploy.codes import Encoded, code_count
from qbench.deploy.linear import NotLinear, integer_weights
from qbench.deploy.onnx_graph import OnnxGraph
from qbench.deploy.qonnx_nodes import add_quant_weights
from qbench.deploy.trace import NotExportable

INT64 = 7
"""The number by which ONNX identifies the type int64."""


def add_weights(graph: OnnxGraph, name: str, weight: Encoded) -> str:
    """Add the codes of weights and the nodes that decode them. Return the name of the decoded weights."""
    if graph.int8:
        return _int8_weights(graph, name, weight)
    if graph.qonnx:
        return add_quant_weights(graph, name, weight)
    levels, codes = weight.levels, weight.numbers().numpy()
    base = f"{name}.codes"
    if levels.form == "book" or len(levels.book):
        number = graph.node("Cast", _codes(graph, base, codes, weight.bits), to=INT64)
        if levels.form == "span":
            points = graph.node("Gather", graph.constant(name, levels.book.numpy()), number)
            values = graph.node("Mul", points, graph.constant(name, levels.scale.unsqueeze(1).numpy()))
            values = graph.node("Add", values, graph.constant(name, levels.low.unsqueeze(1).numpy()))
        else:
            book = graph.constant(name, levels.book.numpy())  # (G, L, D)
            number = graph.node("Unsqueeze", number, graph.integers(2))
            values = graph.node("GatherND", book, number, batch_dims=1)
        return _arranged(graph, name, values, weight)
    if levels.form == "steps":
        scale, low = levels.scale * levels.step, levels.scale * levels.first
    else:
        scale, low = levels.scale / float(max(levels.count - 1, 1)), levels.low
    stored = _codes(graph, base, codes, weight.bits)
    values = graph.node("DequantizeLinear", stored, graph.constant(name, scale.numpy()), axis=0)
    values = graph.node("Add", values, graph.constant(name, low.unsqueeze(1).numpy()))
    return _arranged(graph, name, values, weight)


def _codes(graph: OnnxGraph, name: str, codes: np.ndarray, bits: int) -> str:
    kind = next(kind for width, kind in ((2, "UINT2"), (4, "UINT4"), (8, "UINT8"), (16, "UINT16")) if bits <= width)
    return graph.constant(name, codes, kind)


def _arranged(graph: OnnxGraph, name: str, values: str, weight: Encoded) -> str:
    """Add nodes that bring decoded values from the order of the layout into the shape of the weights."""
    kind, shape = weight.layout.partition(":")[0], weight.shape
    if kind == "bucket":
        flat = graph.node("Reshape", values, graph.integers(-1))
        values = graph.node("Slice", flat, graph.integers(0), graph.integers(code_count(weight.layout, shape)))
    if kind != "subspace":
        result = graph.node("Reshape", values, graph.integers(*shape))
    else:
        # (subspaces, outputs and kernel places, weights per code) -> (outputs, kernel places, channels)
        rows = graph.node("Transpose", values, perm=[1, 0, 2])
        rows = graph.node("Reshape", rows, graph.integers(shape[0], *shape[2:], -1))
        last = len(shape) - 1
        rows = graph.node("Slice", rows, graph.integers(0), graph.integers(shape[1]), graph.integers(last))
        result = graph.node("Transpose", rows, perm=[0, last, *range(1, last)])
    graph.set_shape(result, shape)
    return result


def _int8_weights(graph: OnnxGraph, name: str, weight: Encoded) -> str:
    """Add weights as signed 8-bit integers with zero point 0. There is one scale per layer or per output channel."""
    try:
        integers, scale = integer_weights(weight)
    except NotLinear as reason:
        raise NotExportable(
            f"{name.removesuffix('.weight_q')}: int8 export {reason}\ntry: qbench export RUN --to onnx"
        ) from None
    largest = int(integers.abs().max())
    if largest > 127:
        raise NotExportable(
            f"{name.removesuffix('.weight_q')}: int8 export needs integer weights from -127 to 127, but these "
            f"reach {largest}\ntrain with bits.w=7 or less, or: qbench export RUN --to onnx"
        )
    array = integers.to(torch.int8).numpy()
    scales = graph.constant(name, (scale if weight.layout == "channel" else scale[0]).numpy())
    # the zero point 0 is stored explicitly, because runtimes look for it
    zeros = graph.constant(name, np.zeros(graph.shape(scales), np.int8))
    stored = graph.constant(f"{name}.codes", array)
    result = graph.node("DequantizeLinear", stored, scales, zeros, axis=0)
    graph.set_shape(result, weight.shape)
    return result
