"""Adds activation quantizers to an ONNX graph.

A quantizer becomes QuantizeLinear and DequantizeLinear, rounding, or comparisons.
"""

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.linear import NotLinear, integer_levels
from qbench.deploy.onnx_functions import NoConverter
from qbench.deploy.onnx_graph import OnnxGraph

MAX_COMPARISONS = 30
"""Largest number of thresholds that become comparisons. A 4-bit quantizer has up to 15 on each side of 0."""

HALF_STEP = 1e-4
"""Largest allowed distance between a threshold and the midpoint of two levels, as a fraction of the step."""


def add_quantizer(graph: OnnxGraph, x: str, thresholds: Tensor, levels: Tensor) -> str:
    """Add the nodes of an activation quantizer, and return the name of its output."""
    linear = linear_steps(thresholds, levels)
    few = thresholds.shape[-1] <= MAX_COMPARISONS
    if linear and (graph.int8 or not few):
        step, low = linear
        return _quantize_linear(graph, x, thresholds, levels, step, low)
    if not few:
        raise NoConverter(
            "an activation quantizer of more than 4 bits whose thresholds are not midpoints of its levels"
        )
    shape = [1, -1, *[1] * (len(graph.shape(x)) - 2)] if thresholds.dim() == 2 else []
    y = graph.constant("level", levels[..., 0].reshape(shape).numpy())
    for i in range(thresholds.shape[-1]):
        edge = graph.constant("threshold", thresholds[..., i].reshape(shape).numpy())
        level = graph.constant("level", levels[..., i + 1].reshape(shape).numpy())
        y = graph.node("Where", graph.node("GreaterOrEqual", x, edge), level, y)
    return _exact_integers(graph, y, levels)


def _quantize_linear(graph: OnnxGraph, x: str, thresholds: Tensor, levels: Tensor, step: Tensor, low: Tensor) -> str:
    """Add the nodes of a rounding quantizer with levels low + k * step for k = 0, 1, ..."""
    shape = [1, -1, *[1] * (len(graph.shape(x)) - 2)] if levels.dim() == 2 else []

    def constant(name: str, value: Tensor) -> str:
        return graph.constant(name, value.reshape(shape).numpy())

    count, zero = levels.shape[-1], (-low / step).round()
    shifted = bool(((low + zero * step).abs() > HALF_STEP * step).any() or zero.max() > 255 or zero.min() < 0)
    if not shifted and levels.dim() == 1:  # the quantizer's own step, without a rounding error
        place = int(zero)
        step = levels[place + 1] if place + 1 < count else -levels[place - 1]
    down, up = rounds_middles(thresholds, levels)
    if not (shifted or down or up):  # QuantizeLinear rounds values in the middle to the even code
        if count < 256:  # the integer type has more values than there are levels
            x = graph.node("Max", x, constant("low", -zero * step))
            x = graph.node("Min", x, constant("high", (count - 1 - zero) * step))
        scale, zeros = graph.constant("scale", step.numpy()), graph.constant("zero", zero.to(torch.uint8).numpy())
        codes = graph.node("QuantizeLinear", x, scale, zeros, axis=1)
        return graph.node("DequantizeLinear", codes, scale, zeros, axis=1)
    offset = low if shifted else torch.zeros_like(low)
    x = graph.node("Div", graph.node("Sub", x, constant("low", offset)) if shifted else x, constant("step", step))
    if down:
        x = graph.node("Ceil", graph.node("Sub", x, graph.floats(0.5)))
    else:
        x = graph.node("Floor", graph.node("Add", x, graph.floats(0.5))) if up else graph.node("Round", x)
    first = torch.zeros_like(zero) if shifted else -zero
    x = graph.node("Max", x, constant("low", first))
    x = graph.node("Min", x, constant("high", first + count - 1))
    y = graph.node("Mul", x, constant("step", step))
    return graph.node("Add", y, constant("low", offset)) if shifted else _exact_integers(graph, y, levels)


def _exact_integers(graph: OnnxGraph, y: str, levels: Tensor) -> str:
    """Add QuantizeLinear and DequantizeLinear to an int8 graph.

    These nodes do not change the values, but they let runtimes compute the next layer in integers.
    """
    if not graph.int8:
        return y
    try:
        if levels.dim() == 2:
            raise NotLinear("activations whose channels have different levels")
        integers, unit = integer_levels(levels)
    except NotLinear as reason:
        raise NoConverter(str(reason)) from None
    zero = 128 if bool((integers < 0).any()) else 0
    if bool((integers + zero > 255).any() | (integers + zero < 0).any()):
        raise NoConverter("activations of more than 8 bits")
    scale, zeros = graph.floats(unit), graph.constant("zero", np.array(zero, np.uint8))
    return graph.node("DequantizeLinear", graph.node("QuantizeLinear", y, scale, zeros), scale, zeros)


def _middles(levels: Tensor) -> Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


def rounds_middles(thresholds: Tensor, levels: Tensor) -> tuple[bool, bool]:
    """Return whether midpoints between two levels are always rounded down, and whether they are always rounded up."""
    middles = _middles(levels)
    return bool((thresholds > middles).all()), bool((thresholds <= middles).all())


def linear_steps(thresholds: Tensor, levels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the step and the lowest level of a rounding quantizer, or None for other quantizers.

    A rounding quantizer has equally spaced levels, with thresholds at the midpoints.
    """
    count = levels.shape[-1]
    low, step = levels[..., 0], (levels[..., -1] - levels[..., 0]) / max(count - 1, 1)
    if count < 2 or bool((step <= 0).any()):
        return None
    ideal = low.unsqueeze(-1) + torch.arange(count).to(levels.dtype) * step.unsqueeze(-1)
    off = torch.cat([(levels - ideal).abs(), (thresholds - _middles(levels)).abs()], -1)
    return None if bool((off > HALF_STEP * step.unsqueeze(-1)).any()) else (step, low)
