"""Converts functions of torch to steps of an integer network.

Each converter takes a builder, followed by the parameters of the torch function. Tensor parameters are of the class
`Value`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch

from qbench.deploy.integer_builder import Builder, NotInteger, QuantizerPlace, flat
from qbench.deploy.integer_network import LARGEST
from qbench.deploy.integer_values import Value, fixed, fraction_bits, integer_thresholds, real
from qbench.deploy.linear import NotLinear, integer_levels, integer_weights
from qbench.deploy.network import Sizes, Stored

Array = np.ndarray


class _Sizes(TypedDict, total=False):
    """Parameters of a convolution. A linear layer has none."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def quantize(b: Builder, x: Value, thresholds: Stored, levels: Stored) -> Value:
    """Convert an activation quantizer."""
    edges, heights = (b.network.tensors[stored.name].double() for stored in (thresholds, levels))
    rows = edges.reshape(-1, edges.shape[-1]).numpy()
    if heights.dim() == 2 and bool((heights == heights[0]).all()):
        heights = heights[0]
    try:
        if heights.dim() == 2:
            raise NotLinear("activations whose channels have different levels")
        integers, unit = integer_levels(heights)
    except NotLinear as reason:
        if x.image:  # its layer computes in float64
            levels_of_image = heights.numpy()
            place = b.add("quantize", x, integer=False, thresholds=rows, levels=levels_of_image)
            low, high = (np.broadcast_to(end, x.low.shape) for end in (levels_of_image.min(), levels_of_image.max()))
            return real(place, low, high, image=True)
        raise NotInteger(f"does not support {reason}") from None
    parameters = {}
    if x.integer:
        reached = (rows > x.floor).any(0) & (rows <= x.ceiling).any(0)
        below = int((rows <= x.floor).all(0).sum())
        rows, integers = rows[:, reached], integers[below : below + int(reached.sum()) + 1]
        rows, sign = integer_thresholds(x, rows)
        parameters = {"sign": sign} if bool((sign < 0).any()) else {}
        rows = rows[:1] if bool((rows == rows[:1]).all()) else rows
    table = integers.numpy().astype(np.int32)
    place = b.add("quantize", x, integer=True, thresholds=rows, levels=table, **parameters)
    b.quantizers.append(QuantizerPlace(b.here, place, unit, levels.name))
    low, high = (np.full_like(x.scale, float(end)) for end in (integers.min(), integers.max()))
    return Value(place, True, np.full_like(x.scale, unit), np.zeros_like(x.scale), low, high, codes=True)


def conv2d(
    b: Builder, x: Value, w: Stored, bias: Stored | None = None, stride: Sizes = 1, padding: Sizes | str = 0,
    dilation: Sizes = 1, groups: int = 1,
) -> Value:  # fmt: skip
    """Convert a convolution."""
    if isinstance(padding, str):
        raise NotInteger(f"does not support padding={padding}")
    sizes = _Sizes(stride=_pair(stride), padding=_pair(padding), dilation=_pair(dilation), groups=groups)
    return _product(b, "conv2d", x, w, bias, sizes)


def linear(b: Builder, x: Value, w: Stored, bias: Stored | None = None) -> Value:
    """Convert a linear layer."""
    if len(b.input_shape) != 2:
        raise NotInteger("supports only linear layers whose input is one vector per image")
    return _product(b, "linear", x, w, bias, {})


def _product(b: Builder, function: str, x: Value, w: Stored, bias: Stored | None, sizes: _Sizes) -> Value:
    """Convert a convolution or linear layer.

    The layer computes in integers if its weights and activations are quantized, else in float64.
    """
    weight = b.network.weights.get(w.name)
    if weight is None or x.image:
        return _float_product(b, function, b.as_real(x), w, bias, sizes)
    if not x.codes:
        raise NotInteger(
            "needs quantized activations, but the activations of this layer are float\n"
            "train with bits.a=8 or less, or: qbench export RUN --to packed"
        )
    integers, scale = integer_weights(weight)
    array, column = integers.numpy(), (len(integers), *[1] * (integers.dim() - 2))
    low, high = _product_range(array, x.low, x.high, sizes.get("groups", 1))
    largest = np.maximum(np.abs(low), np.abs(high)).max()
    if largest > LARGEST:
        raise NotInteger(f"needs sums of products of at most {LARGEST:,}, but they reach {largest:,.0f}")
    place = b.add(function, x, integer=True, weight=array, **sizes)
    factor = np.broadcast_to(scale.double().numpy(), len(array)) * float(x.scale.flat[0])
    offset = b.tensor(bias, 0.0, len(array))
    return Value(place, True, factor.reshape(column), offset.reshape(column), low.reshape(column), high.reshape(column))


def _float_product(b: Builder, function: str, x: Value, w: Stored, bias: Stored | None, sizes: _Sizes) -> Value:
    """Convert a layer that computes in float64. If a quantizer follows, the output is converted to fixed point."""
    weight = b.network.weights.get(w.name)
    tensor = b.network.tensors[w.name].double() if weight is None else weight.decode(torch.float64)
    array, column = tensor.numpy(), (len(tensor), *[1] * (tensor.dim() - 2))
    low, high = _product_range(array, x.low, x.high, sizes.get("groups", 1))
    result = real(b.add(function, x, integer=False, weight=array, **sizes), low.reshape(column), high.reshape(column))
    if bias is not None:
        result = b.affine(result, np.ones(column), b.tensor(bias, 0.0, len(array)).reshape(column))
    return b.as_fixed(result) if b.before_quantizer else result


def batch_norm(
    b: Builder, x: Value, mean: Stored, var: Stored, weight: Stored | None = None, bias: Stored | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Value:  # fmt: skip
    """Convert batch normalization."""
    if training:
        raise NotInteger("does not support batch normalization without running statistics")
    means, variances = b.tensor(mean, 0.0, 0), b.tensor(var, 1.0, 0)
    scale = b.tensor(weight, 1.0, len(means)) / np.sqrt(variances + eps)
    shift = b.tensor(bias, 0.0, len(means)) - means * scale
    column = (-1, *[1] * (x.scale.ndim - 1))
    return b.affine(x, scale.reshape(column), shift.reshape(column))


def clamp(b: Builder, x: Value, low: float | None = None, high: float | None = None) -> Value:
    """Convert an activation function that clamps values, such as ReLU."""
    if isinstance(low, Value | Stored) or isinstance(high, Value | Stored):
        raise NotInteger("does not support a clamp with tensors as bounds")
    floor, ceiling = -np.inf if low is None else float(low), np.inf if high is None else float(high)
    if x.codes and (clipped := _clipped_codes(b, x, floor, ceiling)):
        return clipped
    return x.clamp(floor, ceiling) if x.integer else b.clipped(x, floor, ceiling)


def _clipped_codes(b: Builder, x: Value, floor: float, ceiling: float) -> Value | None:
    """Clamp codes, and return the result as codes. Return None if a bound of the clamp is not a level."""
    ends = np.array([floor, ceiling]) / x.scale.flat[0]
    if bool((ends != np.rint(ends)).any()):
        return None
    low, high = (int(end) if np.isfinite(end) else None for end in ends)
    place = b.add("clip", x, integer=True, low=low, high=high)
    return replace(x, place=place, low=np.clip(x.low, *ends), high=np.clip(x.high, *ends))


def add(b: Builder, x: object, y: object, *, alpha: float = 1) -> Value:
    """Convert a sum of two tensors, such as a branch and its shortcut."""
    if not isinstance(x, Value) or not isinstance(y, Value) or alpha != 1:
        raise NotInteger("does not support sums with constants")
    if x.scale.shape != y.scale.shape:
        raise NotInteger("does not support sums of tensors of different shapes")
    (x_low, x_high), (y_low, y_high) = x.interval(), y.interval()
    low, high = x_low + y_low, x_high + y_high
    if not (x.integer or y.integer):
        return real(b.add("add", x, y, integer=False), low, high)
    # fixed point must also hold the two parts, because a part may be larger than their sum
    fraction = fraction_bits(np.minimum.reduce([low, x_low, y_low]), np.maximum.reduce([high, x_high, y_high]))
    x, y = b.as_fixed(x, fraction), b.as_fixed(y, fraction)
    return fixed(b.add("add", x, y, integer=True), low, high, fraction)


def max_pool2d(
    b: Builder, x: Value, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Value:  # fmt: skip
    """Convert max pooling.

    If the scale of a channel is negative, the largest value is stored as the smallest integer.
    """
    if return_indices or _pair(dilation) != [1, 1]:
        raise NotInteger("does not support max pooling with indices or dilation")
    sizes = {"kernel": _pair(kernel_size), "stride": _pair(stride or kernel_size), "padding": _pair(padding)}
    _check_windows(b, ceil_mode, sizes["kernel"], sizes["stride"], sizes["padding"])
    sign = np.where(x.scale < 0, -1.0, 1.0)
    place = b.add("max_pool2d", x, integer=x.integer, **sizes, sign=flat(sign).astype(np.int8))
    low, high = np.minimum(sign * x.low, sign * x.high), np.maximum(sign * x.low, sign * x.high)
    return replace(x, place=place, scale=x.scale * sign, low=low, high=high)


def avg_pool2d(
    b: Builder, x: Value, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    """Convert average pooling to a sum. The divisor becomes part of the scale."""
    kernel, step = _pair(kernel_size), _pair(stride or kernel_size)
    if divisor_override or _pair(padding) != [0, 0]:
        raise NotInteger("does not support average pooling with padding or divisor_override")
    _check_windows(b, ceil_mode, kernel, step, [0, 0])
    count = kernel[0] * kernel[1]
    if x.integer and (x.clamped or np.maximum(np.abs(x.low), np.abs(x.high)).max() * count > LARGEST):
        low, high = x.interval()
        x = b.as_fixed(x, fraction_bits(low * count, high * count))
    place = b.add("sum_pool2d", x, integer=x.integer, kernel=kernel, stride=step)
    summed = replace(x, place=place, low=x.low * count, high=x.high * count, shift=x.shift * count, image=False)
    scale = np.full_like(x.scale, 1 / count)
    return b.affine(summed, scale, np.zeros_like(scale))


def adaptive_avg_pool2d(b: Builder, x: Value, output_size: int | Sequence[int | None]) -> Value:
    """Convert adaptive average pooling, if all windows have the same size."""
    sizes = b.input_shape[2:]
    given = [output_size] * 2 if isinstance(output_size, int) else output_size
    wanted = [size if want is None else want for want, size in zip(given, sizes, strict=True)]
    if any(size % want for size, want in zip(sizes, wanted, strict=True)):
        raise NotInteger(f"does not support adaptive pooling from {sizes} to {tuple(wanted)}")
    return avg_pool2d(b, x, [size // want for size, want in zip(sizes, wanted, strict=True)])


def mean(b: Builder, x: Value, dim: Sizes | None = None, keepdim: bool = False) -> Value:
    """Convert the mean over height and width."""
    shape = b.input_shape
    if len(shape) != 4 or dim is None or sorted(d % 4 for d in _pair(dim)) != [2, 3]:
        raise NotInteger("supports only means over height and width")
    pooled = avg_pool2d(b, x, list(shape[2:]))
    return pooled if keepdim else _flattened(b, pooled, (shape[1], 1, 1))


def pad(b: Builder, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Convert padding with zeros."""
    if mode != "constant" or value:
        raise NotInteger(f"does not support padding with mode={mode}, value={value}")
    if x.integer and (bool((x.shift != 0).any()) or x.clamped):
        x = b.as_fixed(x)
    axes = len(b.input_shape) - 1
    amounts = [[0, 0]] * (axes - len(pad) // 2) + [[pad[i], pad[i + 1]] for i in range(len(pad) - 2, -1, -2)]
    if min(map(min, amounts)) < 0:
        raise NotInteger("does not support negative padding")
    place = b.add("pad", x, integer=x.integer, amounts=amounts)
    around = [amounts[0], *[[0, 0]] * (x.scale.ndim - 1)]
    scale = np.pad(x.scale, around, constant_values=x.scale.min() if x.integer else 1.0)
    ends = np.minimum(x.low, 0), np.maximum(x.high, 0)
    return replace(x, place=place, scale=scale, shift=np.pad(x.shift, around),
                   low=np.pad(ends[0], around), high=np.pad(ends[1], around))  # fmt: skip


def getitem(b: Builder, x: Value, index: object) -> Value:
    """Convert indexing with slices."""
    indices = index if isinstance(index, tuple) else (index,)
    parts = [part for part in indices if isinstance(part, slice)]
    if len(parts) != len(indices) or (parts and parts[0] != slice(None)):
        raise NotInteger("supports only indexing with slices")
    slices = [[part.start, part.stop, part.step] for part in parts[1:]]
    channels = parts[1] if len(parts) > 1 else slice(None)
    place = b.add("take", x, integer=x.integer, slices=slices)
    return x.by_channel(place, lambda values: values[channels])


def reshape(b: Builder, x: Value, *sizes: object) -> Value:
    """Convert a reshape to (N, values)."""
    shape, wanted = b.input_shape, b.output_shape
    if wanted == shape:
        return x
    if len(wanted) != 2 or len(shape) != 4 or wanted[0] != shape[0]:
        raise NotInteger(f"does not support the reshape from {shape[1:]} to {wanted[1:]}")
    return _flattened(b, x, shape[1:])


def _flattened(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    place = b.add("flatten", x, integer=x.integer)
    return x.by_channel(place, lambda values: np.broadcast_to(values, tuple(shape)).reshape(-1))


def _check_windows(
    b: Builder, ceil_mode: bool, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> None:
    sizes = zip(b.input_shape[2:], kernel, stride, padding, strict=True)
    if ceil_mode and any((size + 2 * p - k) % s for size, k, s, p in sizes):
        raise NotInteger("does not support pooling with ceil_mode=True if windows extend beyond the image")


def _product_range(weight: Array, low: Array, high: Array, groups: int) -> tuple[Array, Array]:
    """Return the smallest and the largest possible sum of products of each output, with zero padding.

    Args:
        low, high: smallest and largest value of each input channel or feature.
    """
    w = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).astype(np.float64)
    low, high = np.minimum(low, 0).reshape(groups, 1, -1, 1), np.maximum(high, 0).reshape(groups, 1, -1, 1)
    below = (np.maximum(w, 0) * low + np.minimum(w, 0) * high).sum((2, 3)).reshape(-1)
    above = (np.maximum(w, 0) * high + np.minimum(w, 0) * low).sum((2, 3)).reshape(-1)
    return below, above


def _pair(value: Sizes) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


HANDLERS: Mapping[str, Callable[..., Value]] = {
    "quantize": quantize, "conv2d": conv2d, "linear": linear, "batch_norm": batch_norm, "add": add,
    "max_pool2d": max_pool2d, "avg_pool2d": avg_pool2d, "adaptive_avg_pool2d": adaptive_avg_pool2d, "mean": mean,
    "pad": pad, "getitem": getitem, "flatten": reshape, "reshape": reshape, "view": reshape,
    "contiguous": lambda b, x: x, "clone": lambda b, x: x,
    "clamp": lambda b, x, min=None, max=None: clamp(b, x, min, max),
    "relu": lambda b, x: clamp(b, x, 0.0, None), "relu6": lambda b, x: clamp(b, x, 0.0, 6.0),
    "hardtanh": lambda b, x, min_val=-1.0, max_val=1.0: clamp(b, x, min_val, max_val),
}  # fmt: skip
"""Maps the name of a function in `qbench.deploy.network.FUNCTIONS` to its converter."""
