"""Runs integer networks in NumPy, without torch and without the code of methods and models.

Float layers, such as the first and the last layer, compute in float64. All tensors between float layers are int32. The
export checks that sums of products are at most 2^31 - 1.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

LARGEST = 2**31 - 1
"""Largest magnitude of an integer in an integer network."""

Array = np.ndarray


class IntegerStep(NamedTuple):
    """One call of a function.

    Args:
        function: a name in `FUNCTIONS`.
        inputs: indices of the steps whose results this step reads. -1 means the image.
        numbers: parameters such as strides.
        arrays: parameters such as weights, thresholds and multipliers.
    """

    function: str
    inputs: tuple[int, ...]
    numbers: Mapping[str, object]
    arrays: Mapping[str, Array]


class IntegerNetwork(NamedTuple):
    """A network whose quantized layers compute in integers. The last step returns the logits."""

    steps: Sequence[IntegerStep]

    def run(self, images: Array, observe: Callable[[int, Array], None] = lambda place, result: None) -> Array:
        """Return the logits (N, classes) of normalized images (N, C, H, W).

        Args:
            observe: callback that gets the index and the result of each step.

        Raises:
            ValueError: an integer does not fit into 32 bits. Images in the range of the run's data set never cause this
                error.
        """
        results: dict[int, Array] = {-1: images.astype(np.float64)}
        last = {place: i for i, step in enumerate(self.steps) for place in step.inputs}
        for i, step in enumerate(self.steps):
            inputs = [results[place] for place in step.inputs]
            results[i] = FUNCTIONS[step.function](*inputs, **step.numbers, **step.arrays)
            observe(i, results[i])
            for place in {place for place in step.inputs if last[place] == i}:
                del results[place]
        return results[len(self.steps) - 1]


def _as_type(values: Array, dtype: np.dtype[np.generic]) -> Array:
    """Convert values to the type of a step's input, and check the range of integers."""
    if dtype == np.float64:
        return values
    if not np.abs(values).max(initial=0) <= LARGEST:
        raise ValueError("the images are outside the range for which the network was exported")
    return values.astype(np.int32)


def _by_channel(values: Array, axes: int) -> Array:
    """Return per-channel values in a shape that broadcasts with a tensor of `axes` axes."""
    return values.reshape(values.shape[0], *[1] * (axes - 2)) if values.ndim == 1 else values


def conv2d(
    x: Array, *, weight: Array, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Array:
    """Return a convolution of x, in the type of x.

    BLAS has no integer products. Integers are therefore multiplied as float64, which represents integers below 2^53
    exactly.
    """
    outputs, inputs, *kernel = weight.shape
    x64 = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *((p, p) for p in padding)))
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    windows = sliding_window_view(x64, sizes, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    results = []
    for group in range(groups):
        rows = windows[:, group * inputs : (group + 1) * inputs].transpose(0, 2, 3, 1, 4, 5)
        part = weight[group * outputs // groups : (group + 1) * outputs // groups]
        flat = rows.reshape(-1, inputs * kernel[0] * kernel[1]) @ part.reshape(len(part), -1).T.astype(np.float64)
        results.append(flat.reshape(*rows.shape[:3], len(part)))
    return _as_type(np.concatenate(results, -1).transpose(0, 3, 1, 2), x.dtype)


def linear(x: Array, *, weight: Array) -> Array:
    """Return the product of x and a weight matrix (outputs, inputs), in the type of x."""
    return _as_type(x.astype(np.float64) @ weight.T.astype(np.float64), x.dtype)


def quantize(x: Array, *, thresholds: Array, levels: Array, sign: Array | None = None) -> Array:
    """Return levels[k] for each element of x (N, C, ...), where k is the number of thresholds that are at most x.

    Args:
        thresholds: E ascending thresholds; (1, E) for all channels, or (C, E) for each channel.
        levels: integers (E + 1,), or floats (C, E + 1) if x is an image.
        sign: (C,) with values 1 or -1. x is multiplied by the sign before the comparison.
    """
    if sign is not None:
        x = x * _by_channel(sign, x.ndim)
    rows = np.moveaxis(x, 1, 0)
    flat = rows.reshape(len(rows) if len(thresholds) > 1 else 1, -1)
    counts = np.stack([np.searchsorted(*pair, side="right") for pair in zip(thresholds, flat, strict=True)])
    counts = counts.reshape(len(rows), -1)
    values = levels[counts] if levels.ndim == 1 else np.take_along_axis(levels, counts, 1)
    return np.ascontiguousarray(np.moveaxis(values.reshape(rows.shape), 0, 1))


def rescale(x: Array, *, multiplier: Array, offset: Array, shift: Array, low: Array, high: Array) -> Array:
    """Return (multiplier * x + offset) / 2^shift, rounded and clipped to [low, high].

    The product is computed in 64 bits.
    """
    multiplier, offset, shift, low, high = (
        _by_channel(values.astype(np.int64), x.ndim) for values in (multiplier, offset, shift, low, high)
    )
    half = (np.int64(1) << shift) >> 1
    rounded: Array = np.clip((x * multiplier + offset + half) >> shift, low, high).astype(np.int32)
    return rounded


def fixed_point(x: Array, *, fraction: Array) -> Array:
    """Return floats as integers that count units of 2^-fraction."""
    return _as_type(np.rint(np.ldexp(x, _by_channel(fraction, x.ndim).astype(np.int64))), np.dtype(np.int32))


def affine(x: Array, *, scale: Array, shift: Array) -> Array:
    """Return scale * x + shift as float64."""
    y: Array = x * _by_channel(scale, x.ndim) + _by_channel(shift, x.ndim)
    return y


def add(x: Array, y: Array) -> Array:
    """Return the sum of two tensors of the same type."""
    return _as_type(x + y if x.dtype == np.float64 else x.astype(np.int64) + y, x.dtype)


def clip(x: Array, *, low: float | None, high: float | None) -> Array:
    """Return x clipped to [low, high]. None means no bound."""
    clipped: Array = np.clip(x, low, high)
    return clipped


def max_pool2d(x: Array, *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], sign: Array) -> Array:
    """Return the largest value of sign * x in each window. `sign` is 1 or -1 for each channel."""
    x = x * _by_channel(sign.astype(x.dtype), x.ndim)
    lowest = -np.inf if x.dtype == np.float64 else np.iinfo(x.dtype).min
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)), constant_values=lowest)
    windows = sliding_window_view(x, kernel, axis=(2, 3))
    largest: Array = windows[:, :, :: stride[0], :: stride[1]].max((-2, -1))
    return largest


def sum_pool2d(x: Array, *, kernel: Sequence[int], stride: Sequence[int]) -> Array:
    """Return the sum of the values in each window."""
    windows = sliding_window_view(x, kernel, axis=(2, 3))[:, :, :: stride[0], :: stride[1]]
    return _as_type(windows.sum((-2, -1), dtype=np.float64 if x.dtype == np.float64 else np.int64), x.dtype)


def pad(x: Array, *, amounts: Sequence[Sequence[int]]) -> Array:
    """Return x padded with zeros.

    `amounts` contains the number of zeros before and after x, for each axis except the first.
    """
    return np.pad(x, ((0, 0), *map(tuple, amounts)))


def take(x: Array, *, slices: Sequence[Sequence[int | None]]) -> Array:
    """Return a part of x.

    `slices` contains start, stop and step for each axis except the first.
    """
    return np.ascontiguousarray(x[(slice(None), *(slice(*part) for part in slices))])


def flatten(x: Array) -> Array:
    """Return x reshaped to (N, values)."""
    return x.reshape(len(x), -1)


FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        conv2d, linear, quantize, rescale, fixed_point, affine, add, clip, max_pool2d, sum_pool2d, pad, take, flatten,
    )
}  # fmt: skip
"""Maps the name of a step's function to the function itself."""
