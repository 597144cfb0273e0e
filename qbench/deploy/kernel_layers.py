"""Compiles the kernel of one layer with numba.

A kernel consists of a source and a finish. The source computes values: a convolution of codes (`planes` or `tables`), a
convolution of floats (`floats`), or pooling (`pool`). The finish applies a ramp (slope * x + offset, then a clamp), may
add another map and apply a second ramp, and stores the values as floats, as codes, or both. Sizes are constants of the
compiled functions, so LLVM can unroll loops. A kernel computes 16 channels of one pixel at a time, as one vector.

Memory is one array of bytes. A map is a feature map in this memory. In a map of floats, channels are the last axis,
padded to a multiple of 16. A map of codes has one of two formats (`qbench.deploy.kernel_planes` and
`qbench.deploy.kernel_tables`). Maps have a border, which serves as the padding of convolutions.

The window of an output pixel is the part of the input that this pixel reads. It consists of pieces of consecutive
bytes, which are called parts (class `qbench.deploy.kernel_addresses.Window`).

Layers of the same shape share a kernel but have different addresses. Addresses are therefore arguments of the kernel
(class `At`).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qbench.deploy.kernel_addresses import At, Strides, Window
from qbench.deploy.kernel_compile import compiled, inlined
from qbench.deploy.kernel_planes import planes, to_planes
from qbench.deploy.kernel_tables import tables, to_tables
from qbench.deploy.kernel_vectors import (
    BYTES,
    Bytes,
    Source,
    Vector,
    larger,
    load_float,
    load_floats,
    smaller,
    splat,
    store,
    to_floats,
)

__all__ = [
    "At",
    "Finish",
    "Strides",
    "Window",
    "floats",
    "layer",
    "planes",
    "pool",
    "read_image",
    "tables",
    "write_logits",
]

Ramp = Callable[[Bytes, int, Vector], Vector]
"""Function (memory, address of the parameters, 16 values) -> 16 values."""


def floats(window: Window, count: int) -> Source:
    """Return the source of a convolution of floats.

    Args:
        count: number of floats in one part of the window.
    """
    rows, row, columns, column, down, right, vectors, group = window

    @compiled
    def values(memory: Bytes, at: At, y: int, x: int, output: int, o: int) -> Vector:
        weights = at.weights + o * (rows * columns * count * BYTES)
        patch = at.input + y * down + x * right + o // vectors * group
        total: Vector = splat(np.float32(0))
        for i in range(rows):
            for j in range(columns):
                for k in range(count):
                    a = load_float(memory, patch + i * row + j * column + 4 * k)
                    total = total + splat(a) * load_floats(memory, weights)
                    weights += BYTES
        return total

    return values


def pool(
    window: Window, height: int, width: int, stride: tuple[int, int], padding: tuple[int, int], mean: bool, inside: bool
) -> Source:
    """Return the source of max pooling or average pooling. With windows of one pixel, the source copies a map.

    Args:
        height, width: size of the input in pixels. Pixels outside the input count neither in the maximum nor in the
            mean.
        inside: whether all windows lie completely inside the input.
    """
    rows, row, columns, column, down, right, _, _ = window

    @compiled
    def values(memory: Bytes, at: At, y: int, x: int, output: int, o: int) -> Vector:
        top, left = y * stride[0] - padding[0], x * stride[1] - padding[1]
        result: Vector = splat(np.float32(0 if mean else -np.inf))
        count = 0
        for i in range(0 if inside else max(0, -top), rows if inside else min(rows, height - top)):
            for j in range(0 if inside else max(0, -left), columns if inside else min(columns, width - left)):
                pixel = at.input + y * down + x * right + i * row + j * column
                found = load_floats(memory, pixel + o * BYTES)
                result = result + found if mean else larger(found, result)
                count += 1
        return result * splat(np.float32(1) / np.float32(count)) if mean else result

    return values


@cache
def _ramp(linear: bool, bounded: bool) -> Ramp:
    """Return a function that computes a ramp: slope * x + offset, a clamp, or both in this order.

    The parameters of the ramp are slopes, offsets, lowest and highest values, per channel.
    """

    @inlined
    def run(memory: Bytes, parameters: int, x: Vector) -> Vector:
        if linear:
            x = load_floats(memory, parameters) * x + load_floats(memory, parameters + BYTES)
        if bounded:
            low, high = load_floats(memory, parameters + 2 * BYTES), load_floats(memory, parameters + 3 * BYTES)
            x = smaller(larger(x, low), high)
        return x

    return run


RampParts = tuple[bool, bool]
"""Whether a ramp has a slope or an offset, and whether it has bounds."""

NO_RAMP: RampParts = (False, False)


class Finish(NamedTuple):
    """The operations on the values that a source computes, in the order of the arguments.

    Args:
        integers: whether the source returns integers.
        ramp, second_ramp: the operations of the first ramp and of the second ramp.
        residual: strides of the map of floats that is added between the ramps, or None if no map is added.
        floats: strides of the output map of floats, or None if the values are not stored as floats.
        thresholds: number of thresholds that turn values into codes, 0 to 3. 0 means no codes.
        codes: strides of the output map of codes, or None if no codes are stored.
        tables: whether codes are stored as tables. If false, codes are stored as planes.
    """

    integers: bool = False
    ramp: RampParts = NO_RAMP
    residual: Strides | None = None
    second_ramp: RampParts = NO_RAMP
    floats: Strides | None = None
    thresholds: int = 0
    codes: Strides | None = None
    tables: bool = False

    @property
    def integer_thresholds(self) -> bool:
        """Whether integers are compared with integer thresholds, without a conversion to floats."""
        return self.integers and not (any(self.ramp + self.second_ramp) or self.residual or self.floats)


def layer(source: Source, finish: Finish, height: int, width: int, vectors: int) -> Callable[[Bytes, At], None]:
    """Return the compiled kernel of a layer, a function of (memory, at).

    Args:
        height, width, vectors: size of the output in pixels, and number of vectors of channels per pixel.
    """
    integers, residual = finish.integers, finish.residual is not None
    ramp, second_ramp = _ramp(*finish.ramp), _ramp(*finish.second_ramp)
    stored, thresholds = finish.floats is not None, finish.thresholds
    row, pixel, _, _ = finish.floats or Strides(0, 0, 0)
    # The output's strides do not fit the residual, which may be the image (no padding). Some outputs are not stored.
    residual_row, residual_pixel, _, _ = finish.residual or Strides(0, 0, 0)
    convert = to_floats if integers and not finish.integer_thresholds else _same
    codes_row, codes_pixel, codes_vector, codes_plane = finish.codes or Strides(0, 0, 0)
    if finish.tables:
        to_codes = to_tables(thresholds, finish.integer_thresholds)
    else:
        to_codes = to_planes(thresholds, finish.integer_thresholds, codes_plane)

    @compiled
    def run(memory: Bytes, at: At) -> None:
        for y in range(height):
            for x in range(width):
                for o in range(vectors):
                    found = convert(source(memory, at, y, x, (y * width + x) * vectors + o, o))
                    found = ramp(memory, at.ramp + o * RAMP_BYTES, found)
                    if residual:
                        added = at.residual + y * residual_row + x * residual_pixel + o * BYTES
                        found = found + load_floats(memory, added)
                    found = second_ramp(memory, at.second_ramp + o * RAMP_BYTES, found)
                    if stored:
                        store(memory, at.floats + y * row + x * pixel + o * BYTES, found)
                    if thresholds:
                        parameters = at.thresholds + o * (thresholds + 1) * BYTES
                        codes = at.codes + y * codes_row + x * codes_pixel + o * codes_vector
                        to_codes(memory, at, parameters, codes, found)

    return run


@inlined
def _same(x: Vector) -> Vector:
    return x


RAMP_BYTES = 4 * BYTES
"""Number of bytes of a ramp's parameters for one vector of channels."""


@compiled
def read_image(memory: Bytes, address: int, row: int, pixel: int, image: npt.NDArray[np.float32]) -> None:
    """Store an image (C, H, W) as a map of floats."""
    channels, height, width = image.shape
    for y in range(height):
        for x in range(width):
            for c in range(channels):
                store(memory, address + y * row + x * pixel + 4 * c, image[c, y, x])


@compiled
def write_logits(memory: Bytes, address: int, logits: npt.NDArray[np.float32]) -> None:
    """Copy the logits (classes,) out of a map of floats."""
    for i in range(len(logits)):
        logits[i] = load_float(memory, address + 4 * i)
