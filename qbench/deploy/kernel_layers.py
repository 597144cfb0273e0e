"""Kernels of one layer, compiled by numba.

A layer has a source and a finish. The source computes values: of a convolution of codes (`bits`), of
a convolution of floats (`floats`), or of pooling (`pool`). The finish stores them as floats
(`to_map`), or as codes (`to_codes`). Sizes are constants of the compiled functions, so LLVM unrolls
their loops. A layer computes 16 channels of one pixel at a time, as one vector.

Memory is one array of bytes. A map of floats has its channels last, in whole vectors. A map of codes
is one plane of bits, or two. A plane has 16 bits for each vector of channels, and its channels last
too. So one row of a convolution's kernel reads consecutive bits of a plane. Maps have a border of
zeros, which is the padding of convolutions.

Addresses differ between layers of the same shape, so they are arguments; see `At`.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from qbench.deploy.kernel_vectors import (
    BYTES,
    at_least,
    count_ones,
    larger,
    load_float,
    load_floats,
    load_half,
    load_integers,
    load_word,
    smaller,
    splat,
    store,
    to_floats,
)

Function = Callable[..., Any]


def compiled(function: Function, **options: bool) -> Function:
    """Return a function for other compiled functions, whose name states the constants of its closure.

    In stored code, numba finds functions by name. Functions of one factory would have the same name,
    and one stored network would call those of another.
    """
    constants = [_described(cell.cell_contents) for cell in function.__closure__ or ()]
    function.__qualname__ += "_" + hashlib.sha256(repr(constants).encode()).hexdigest()[:16]
    result: Function = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
    return result


def inlined(function: Function) -> Function:
    """Return a compiled function whose code LLVM copies into its callers."""
    return compiled(function, forceinline=True)


def _described(constant: Any) -> str:
    """Return a text that differs for different constants: numbers, texts, or compiled functions."""
    name = getattr(getattr(constant, "py_func", constant), "__qualname__", None)
    return repr(constant) if name is None else str(name)


class At(NamedTuple):
    """Addresses that a layer reads and writes.

    Args:
        input: the first window of the input.
        weights: vectors of weights, in the order in which they are read.
        correction: a vector of integers for each output, added to it.
        ramp, second_ramp: parameters of the two ramps of a finish.
        residual: a map of floats, added to the values.
        floats: the output as floats.
        thresholds: thresholds of each vector of channels, and the channels in which codes decrease.
        codes: the output as codes.
    """

    input: int = 0
    weights: int = 0
    correction: int = 0
    ramp: int = 0
    residual: int = 0
    second_ramp: int = 0
    floats: int = 0
    thresholds: int = 0
    codes: int = 0


class Window(NamedTuple):
    """The part of the input that one output pixel reads.

    Args:
        rows: rows of the kernel.
        row: bytes from one row of the input to the next.
        down, right: bytes from the window of one output pixel to those of the pixels below and to the right.
    """

    rows: int
    row: int
    down: int
    right: int


Source = Function
"""(memory, at, y, x, output, vector of channels) -> 16 values. `output` is the number of the vector in the output."""


def bits(
    window: Window, halves: int, plane: int, w_bits: int, a_bits: int, odd: bool, unit: int, corrected: bool
) -> Source:
    """Return the source of a convolution of codes, which counts ones in products of bit planes.

    For weights in two's complement, w = w_0 - 2 w_1, and activations a = a_0 + 2 a_1:

        sum w a = ones(w_0 & a_0) + 2 ones(w_0 & a_1) - 2 ones(w_1 & a_0) - 4 ones(w_1 & a_1)

    For weights that are odd integers, w = (2 w_0 - 1) + 2 (2 w_1 - 1), the result is

        ones(w_0 ^ a_0) + 2 ones(w_0 ^ a_1) + 2 ones(w_1 ^ a_0) + 4 ones(w_1 ^ a_1)

    and the sum of products is a constant of the output minus this result. The result is an exact integer, times
    `unit`, plus the correction.

    Args:
        halves: 16-bit parts in one row of the kernel.
        plane: bytes from the first plane of the input to the second.
        w_bits, a_bits: 1 or 2.
    """
    rows, row, down, right = window
    words, rest = halves // 2, halves % 2
    count = rows * words + (rows + 1) // 2 * rest
    sign = 1 if odd else -1
    add = _products(w_bits, a_bits, odd)

    @compiled
    def values(memory: Any, at: Any, y: Any, x: Any, output: Any, o: Any) -> Any:
        zero = splat(np.int32(0))
        sums = zero, zero, zero
        patch = at.input + y * down + x * right
        weights = at.weights + o * (count * w_bits * BYTES)
        for i in range(rows):
            for k in range(words):
                place = patch + i * row + 4 * k
                a1 = load_word(memory, place + plane) if a_bits == 2 else np.int32(0)
                sums = add(memory, weights, load_word(memory, place), a1, sums)
                weights += w_bits * BYTES
        if rest:
            for i in range(0, rows, 2):
                place = patch + i * row + 4 * words
                a1 = _rests(memory, place + plane, row, i + 1 < rows) if a_bits == 2 else np.int32(0)
                sums = add(memory, weights, _rests(memory, place, row, i + 1 < rows), a1, sums)
                weights += w_bits * BYTES
        ones, twos, fours = sums
        result = ones
        if a_bits == 2 or w_bits == 2:
            result = result + splat(np.int32(2)) * twos
        if a_bits == 2 and w_bits == 2:
            result = result + splat(np.int32(4 * sign)) * fours
        if corrected:
            result = splat(np.int32(unit)) * result + load_integers(memory, at.correction + output * BYTES)
        return result

    result: Source = values
    return result


@cache
def _products(w_bits: int, a_bits: int, odd: bool) -> Function:
    """Return the function that adds the products of one word of the activations with 16 words of the weights."""

    @inlined
    def product(w: Any, a: Any) -> Any:
        return count_ones(w ^ a if odd else w & a)

    @compiled
    def add(memory: Any, weights: Any, a0: Any, a1: Any, sums: Any) -> Any:
        ones, twos, fours = sums
        w0 = load_integers(memory, weights)
        ones = ones + product(w0, splat(a0))
        if a_bits == 2:
            twos = twos + product(w0, splat(a1))
        if w_bits == 2:
            w1 = load_integers(memory, weights + BYTES)
            signed = product(w1, splat(a0))
            twos = twos + signed if odd else twos - signed
            if a_bits == 2:
                fours = fours + product(w1, splat(a1))
        return ones, twos, fours

    result: Function = add
    return result


@inlined
def _rests(memory: Any, place: Any, row: Any, both: Any) -> Any:
    """Return the last 16 bits of a row of the kernel, and those of the next row."""
    low = load_half(memory, place)
    return low | load_half(memory, place + row) << 16 if both else low


def floats(window: Window, count: int) -> Source:
    """Return the source of a convolution of floats.

    Args:
        count: floats in one row of the kernel.
    """
    rows, row, down, right = window

    @compiled
    def values(memory: Any, at: Any, y: Any, x: Any, output: Any, o: Any) -> Any:
        weights = at.weights + o * (rows * count * BYTES)
        total = splat(np.float32(0))
        for i in range(rows):
            for k in range(count):
                a = load_float(memory, at.input + y * down + x * right + i * row + 4 * k)
                total = total + splat(a) * load_floats(memory, weights)
                weights += BYTES
        return total

    result: Source = values
    return result


def pool(window: Window, columns: int, column: int, height: int, width: int, stride: tuple[int, int],
         padding: tuple[int, int], mean: bool) -> Source:  # fmt: skip
    """Return the source of the largest or the mean value in each window. A window of one pixel copies a map.

    Args:
        columns: columns of the window.
        column: bytes from one column of the input to the next.
        height, width: pixels of the input. Pixels outside are not counted.
    """
    rows, row, down, right = window

    inside = padding == (0, 0) and rows <= height and columns <= width and height % stride[0] == width % stride[1] == 0

    @compiled
    def values(memory: Any, at: Any, y: Any, x: Any, output: Any, o: Any) -> Any:
        top, left = y * stride[0] - padding[0], x * stride[1] - padding[1]
        result = splat(np.float32(0 if mean else -np.inf))
        count = 0
        for i in range(0 if inside else max(0, -top), rows if inside else min(rows, height - top)):
            for j in range(0 if inside else max(0, -left), columns if inside else min(columns, width - left)):
                pixel = at.input + y * down + x * right + i * row + j * column
                found = load_floats(memory, pixel + o * BYTES)
                result = result + found if mean else larger(found, result)
                count += 1
        return result * splat(np.float32(1) / np.float32(count)) if mean else result

    result: Source = values
    return result


@compiled
def _ramp(memory: Any, parameters: Any, x: Any) -> Any:
    """Return slope x + offset, bounded: the parameters are slopes, offsets, lowest and highest values."""
    y = load_floats(memory, parameters) * x + load_floats(memory, parameters + BYTES)
    return smaller(larger(y, load_floats(memory, parameters + 2 * BYTES)), load_floats(memory, parameters + 3 * BYTES))


class Strides(NamedTuple):
    """Bytes from one row, pixel and plane of a map to the next."""

    row: int
    pixel: int
    plane: int = 0


class Finish(NamedTuple):
    """What becomes of the values of a layer, in this order.

    Args:
        integers: whether the values are integers.
        ramp, residual, second_ramp: whether values go through a ramp, are added to a residual, and go
            through another ramp.
        floats: where they are stored as floats.
        thresholds: number of thresholds, 0 to 3, that turn them into codes.
        codes: where the codes are stored.
    """

    integers: bool = False
    ramp: bool = False
    residual: bool = False
    second_ramp: bool = False
    floats: Strides | None = None
    thresholds: int = 0
    codes: Strides | None = None

    @property
    def integer_thresholds(self) -> bool:
        """Whether integers are compared with thresholds, and do not become floats before."""
        return self.integers and not (self.ramp or self.residual or self.second_ramp or self.floats)


def layer(source: Source, finish: Finish, height: int, width: int, vectors: int) -> Function:
    """Return the compiled function (memory, at) of a layer.

    Args:
        height, width, vectors: pixels of the output, and its vectors of channels.
    """
    integers, ramp, residual, second_ramp = finish.integers, finish.ramp, finish.residual, finish.second_ramp
    stored, thresholds = finish.floats is not None, finish.thresholds
    row, pixel, _ = finish.floats or Strides(0, 0)
    convert = to_floats if integers and not finish.integer_thresholds else _same
    to_codes, codes = _to_codes(thresholds, finish.integer_thresholds), finish.codes or Strides(0, 0)
    codes_row, codes_pixel, codes_plane = codes

    @compiled
    def run(memory: Any, at: Any) -> None:
        for y in range(height):
            for x in range(width):
                for o in range(vectors):
                    found = convert(source(memory, at, y, x, (y * width + x) * vectors + o, o))
                    place = y * row + x * pixel + o * BYTES
                    if ramp:
                        found = _ramp(memory, at.ramp + o * RAMP_BYTES, found)
                    if residual:
                        found = found + load_floats(memory, at.residual + place)
                    if second_ramp:
                        found = _ramp(memory, at.second_ramp + o * RAMP_BYTES, found)
                    if stored:
                        store(memory, at.floats + place, found)
                    if thresholds:
                        parameters = at.thresholds + o * (thresholds + 1) * BYTES
                        to_codes(
                            memory, parameters, at.codes + y * codes_row + x * codes_pixel + 2 * o, codes_plane, found
                        )

    result: Function = run
    return result


@inlined
def _same(x: Any) -> Any:
    return x


RAMP_BYTES = 4 * BYTES
"""Bytes of the parameters of a ramp for one vector of channels."""


@cache
def _to_codes(thresholds: int, integers: bool) -> Function:
    """Return a function that stores the number of thresholds at or below each of 16 values, as bits."""
    load = load_integers if integers else load_floats

    @compiled
    def run(memory: Any, parameters: Any, place: Any, plane: Any, found: Any) -> None:
        falling = load_word(memory, parameters)
        # one bit per channel; those of a higher threshold are a subset of those of a lower one
        low = at_least(found, load(memory, parameters + BYTES)) ^ falling
        if thresholds > 1:
            high = at_least(found, load(memory, parameters + 2 * BYTES)) ^ falling
            store(memory, place + plane, np.uint16(high))
            low ^= high
        if thresholds > 2:
            low ^= at_least(found, load(memory, parameters + 3 * BYTES)) ^ falling
        store(memory, place, np.uint16(low))

    result: Function = run
    return result


@compiled
def read_image(memory: Any, address: Any, row: Any, pixel: Any, image: Any) -> None:
    """Store an image (C, H, W) as a map of floats."""
    channels, height, width = image.shape
    for y in range(height):
        for x in range(width):
            for c in range(channels):
                store(memory, address + y * row + x * pixel + 4 * c, image[c, y, x])


@compiled
def write_logits(memory: Any, address: Any, logits: Any) -> None:
    """Load logits (classes,) from a map of floats."""
    for i in range(len(logits)):
        logits[i] = load_float(memory, address + 4 * i)
