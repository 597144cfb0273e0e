"""Computes the levels and the cost of each layer of a quantized network. The network may be on the meta device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qbench.bits import FLOAT, Bits
from qbench.cost.count import storage
from qbench.quant.image import ImageQuantizer
from qbench.quant.layers import FloatLayer, QLayer, TransposedConvolution, new_float_layer, quantizers
from qbench.quant.method import Method
from qbench.quant.quantizer import Grid, IdentityQuantizer, Quantizer

MAX_CHANNELS = 16
"""Maximum number of channels of the small layer that is built to find a quantizer's levels."""


class Levels(NamedTuple):
    """The values that a quantizer allows in one scale group (a set of values that share a scale)."""

    number: int
    """The number of levels."""

    dimension: int
    """Number of weights that one level represents: above 1 for product quantization, else 1."""

    per: str
    """The part of a tensor that shares one scale: "layer", "channel", or "N values" for a group of N values."""

    steps: int | None
    """The largest level divided by the step, if all levels are multiples of one step.

    The value is None if there is no such step, and 0 if the step is not known before the method has seen data.
    """

    symmetric: bool = False
    """Whether the negative of every level is a level too."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The levels and the cost of one layer."""

    name: str
    shape: tuple[int, ...]
    """Shape of the weights."""

    bits: Bits
    quantizers: Mapping[str, str]
    """Tensor (w, a or g) -> class of the quantizer. Only quantizers that declare a grid are included."""

    weights: Levels | None
    inputs: Levels | None
    rescaled: bool
    """Whether the forward pass scales the layer's output by a value computed from the layer's input."""

    params: int
    macs: int
    bitops: int
    bytes_ideal: float
    bytes_packed: int


LevelsOf = Callable[..., Levels | None]
"""Function of (slot, layer class, shape of the weights, bits) that returns the levels of a small layer's quantizer.

The slot is "weight" or "input". The function returns None if the levels are not known.
"""


def layer_costs(model: nn.Module, method: Method, macs: Mapping[str, int]) -> list[LayerCost]:
    """Return the cost of each layer in `macs`, in the order of `macs`. Batch normalization is not included."""
    levels_of = cache(partial(_levels, method))
    return [_cost(name, model.get_submodule(name), levels_of, count) for name, count in macs.items()]


def _cost(name: str, layer: nn.Module, levels_of: LevelsOf, macs: int) -> LayerCost:
    if not isinstance(layer, FloatLayer):
        return _float_cost(name or type(layer).__name__, layer, macs)
    quantized = layer if isinstance(layer, QLayer) else None
    bits = quantized.bits if quantized else Bits()
    bias = 0 if layer.bias is None else layer.bias.numel()
    ideal: float = 4 * (layer.weight.numel() + bias)
    packed = int(ideal)
    if quantized and bits.w < FLOAT:
        stored = storage(quantized)
        ideal, packed = stored.ideal + 4 * bias, stored.packed + 4 * bias
    return LayerCost(
        name=name,
        shape=tuple(layer.weight.shape),
        bits=bits,
        quantizers={k: _title(q) for k, q in quantizers(quantized).items() if q.declares_grid} if quantized else {},
        weights=_weight_levels(quantized, levels_of) if quantized and bits.w < FLOAT else None,
        inputs=_input_levels(quantized, levels_of) if quantized else None,
        rescaled=quantized is not None and bits.g == FLOAT and type(quantized.output_q) is not IdentityQuantizer,
        params=layer.weight.numel() + bias,
        macs=macs,
        bitops=macs * bits.w * bits.a,
        bytes_ideal=ideal,
        bytes_packed=packed,
    )


def _float_cost(name: str, module: nn.Module, macs: int) -> LayerCost:
    """Return the cost of a module that cannot be quantized, such as a recurrent layer."""
    own = list(module.parameters(recurse=False))
    params = sum(parameter.numel() for parameter in own)
    return LayerCost(
        name=name,
        shape=tuple(max(own, key=torch.Tensor.numel).shape) if own else (),
        bits=Bits(),
        quantizers={},
        weights=None,
        inputs=None,
        rescaled=False,
        params=params,
        macs=macs,
        bitops=macs * FLOAT * FLOAT,
        bytes_ideal=4 * params,
        bytes_packed=4 * params,
    )


def _title(quantizer: Quantizer) -> str:
    return f"{type(quantizer).__module__.rpartition('.')[2]}.{type(quantizer).__qualname__}"


def _weight_levels(layer: QLayer, levels_of: LevelsOf) -> Levels | None:
    """Return the levels of a layer's weights.

    The number of scale groups and the number of codewords depend on the size of the layer, and come from its own grid.
    The other values come from a small layer, because the layer may have no values (meta tensors).
    """
    small: Levels | None = levels_of("weight", type(layer), _small_shape(layer), layer.bits.w)
    weight = layer.weight.detach()
    try:
        grid = layer.weight_q.grid(weight)
        if small is None or grid is None:
            return small
        groups, points, dimension = grid.points.shape
        per = _scale_group(groups, len(weight), grid.arrange(weight).shape[1] * dimension)
    except (RuntimeError, ValueError, NotImplementedError):  # the grid depends on values
        return small
    return small._replace(number=points if dimension > 1 else small.number, per=per)


def _scale_group(groups: int, outputs: int, size: int) -> str:
    """Return a text on the weights that share a scale: a layer, a channel, or `size` values."""
    return "layer" if groups == 1 else "channel" if groups == outputs else f"{size} values"


def _input_levels(layer: QLayer, levels_of: LevelsOf) -> Levels | None:
    if isinstance(layer.input_q, ImageQuantizer):
        return Levels(2**layer.input_q.bits, 1, "channel", None)
    return levels_of("input", type(layer), _small_shape(layer), layer.bits.a) if layer.bits.a < FLOAT else None


def _small_shape(layer: FloatLayer) -> tuple[int, ...]:
    """Return the shape of the weights, with at most `MAX_CHANNELS` channels."""
    outputs, inputs, *kernel = layer.weight.shape
    return (min(outputs, MAX_CHANNELS), min(inputs, MAX_CHANNELS), *kernel)


def _levels(method: Method, slot: str, kind: type[nn.Module], shape: tuple[int, ...], bits: int) -> Levels | None:
    """Return the levels of a quantizer.

    The levels are found by building a small layer with random weights. Meta tensors are not sufficient, because the
    levels may depend on the values of the weights.
    """
    factory = method.weight if slot == "weight" else method.input
    if factory is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = _small_layer(kind, shape)
        value: Tensor = layer.weight.detach()
        if slot == "input":
            value = torch.rand(2, shape[1], *[4] * len(shape[2:]))
        try:
            quantizer = factory("layer", layer, bits)
            with torch.no_grad():
                quantizer(value)  # sets steps and ranges that are initialized from the first batch
                grid = quantizer.grid(value)
        except (RuntimeError, ValueError):  # the quantizer has no levels before it has seen the network
            return None
    return None if grid is None else _read(grid, value)


def _small_layer(kind: type[nn.Module], shape: tuple[int, ...]) -> FloatLayer:
    """Return a float layer of the given class, with weights of the given shape."""
    outputs, inputs, *kernel = shape
    if issubclass(kind, TransposedConvolution):
        outputs, inputs = inputs, outputs
    layer = new_float_layer(kind, inputs, outputs, kernel)
    if len(kernel) == 2:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layer


def _read(grid: Grid, value: Tensor) -> Levels | None:
    """Return the levels of a grid's first scale group, or None if the group has no levels."""
    groups, _, dimension = grid.points.shape
    first = grid.points[0]
    first = first[~first.isnan().any(1)].double()
    if not len(first):
        return None
    size = grid.arrange(value).shape[1] * dimension
    steps = _steps(first.flatten()) if dimension == 1 else None
    symmetric = dimension == 1 and torch.equal(first.flatten().sort().values, (-first).flatten().sort().values)
    return Levels(len(first), dimension, _scale_group(groups, len(value), size), steps, symmetric)


def _steps(points: Tensor) -> int | None:
    """Return the largest level divided by the step, or None if the levels are not multiples of one step.

    Let d be the smallest distance between two levels, or between a level and zero. The step can be d or d / 2. If all
    levels are zero, the result is 0.

    Args:
        points: the levels in ascending order, of shape (L,) for L levels.
    """
    distances = torch.cat([points.abs(), points.diff().abs()])
    if not bool((distances > 0).any()):
        return 0
    least = distances[distances > 0].min()
    largest = points.abs().max()
    for step in (least, least / 2):
        count = (largest / step).round()
        multiples = points / (largest / count)  # the largest level has the smallest relative rounding error
        if torch.allclose(multiples, multiples.round(), rtol=0, atol=1e-3):
            return int(count)
    return None
