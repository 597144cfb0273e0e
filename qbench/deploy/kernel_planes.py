"""Computes convolutions of codes that are stored as planes of bits, by counting ones in products of planes.

A map of codes consists of one or two planes of bits, one for each bit of a code. In a plane, channels are the last
axis, with 16 bits per vector of channels. One row of a convolution's filter therefore reads consecutive bits of a
plane. With AVX-512 (VPOPCNTDQ), one instruction counts the ones of 16 output channels.

The module `qbench.deploy.kernel_layers` explains kernels, sources and maps.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from qbench.deploy.kernel_addresses import At, Window
from qbench.deploy.kernel_compile import compiled, inlined
from qbench.deploy.kernel_thresholds import codes_of
from qbench.deploy.kernel_vectors import (
    BYTES,
    Bytes,
    Integer,
    Source,
    ToCodes,
    Vector,
    count_ones,
    load_half,
    load_integers,
    load_word,
    splat,
    store,
)

Sums = tuple[Vector, Vector, Vector]
"""Sums of products, with the factors 1, 2 and 4."""


def planes(
    window: Window, halves: int, plane: int, w_bits: int, a_bits: int, odd: bool, unit: int, corrected: bool
) -> Source:
    """Return the source of a convolution of codes. The source counts the ones in products of bit planes.

    For weights in two's complement, w = w_0 - 2 w_1, and activations a = a_0 + 2 a_1, the source computes

        sum w a = ones(w_0 & a_0) + 2 ones(w_0 & a_1) - 2 ones(w_1 & a_0) - 4 ones(w_1 & a_1)

    For weights that are odd integers, w = (2 w_0 - 1) + 2 (2 w_1 - 1), the source computes

        ones(w_0 ^ a_0) + 2 ones(w_0 ^ a_1) + 2 ones(w_1 ^ a_0) + 4 ones(w_1 ^ a_1)

    The sum of products is then a constant minus this result, with one constant for each output. All results are exact
    integers. If `corrected` is true, the source returns the result times `unit` plus the correction.

    Args:
        halves: number of 16-bit words in one part of the window.
        plane: number of bytes from the first plane of the input to the second plane.
        w_bits, a_bits: widths of weights and activations in bits, 1 or 2.
    """
    rows, row, columns, column, down, right, vectors, group = window
    words, rest = halves // 2, halves % 2
    parts = rows * columns
    count = parts * words + (parts + 1) // 2 * rest
    sign = 1 if odd else -1
    add = _products(w_bits, a_bits, odd)

    @compiled
    def values(memory: Bytes, at: At, y: int, x: int, output: int, o: int) -> Vector:
        zero: Vector = splat(np.int32(0))
        sums = zero, zero, zero
        patch = at.input + y * down + x * right + o // vectors * group
        weights = at.weights + o * (count * w_bits * BYTES)
        for i in range(rows):
            for j in range(columns):
                for k in range(words):
                    place = patch + i * row + j * column + 4 * k
                    a1: Integer = load_word(memory, place + plane) if a_bits == 2 else np.int32(0)
                    sums = add(memory, weights, load_word(memory, place), a1, sums)
                    weights += w_bits * BYTES
        if rest:
            # the last 16 bits of two parts share a word
            for p in range(0, parts, 2):
                place = patch + p // columns * row + p % columns * column + 4 * words
                other = patch + (p + 1) // columns * row + (p + 1) % columns * column + 4 * words
                both = p + 1 < parts
                a1 = _rests(memory, place + plane, other + plane, both) if a_bits == 2 else np.int32(0)
                sums = add(memory, weights, _rests(memory, place, other, both), a1, sums)
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

    return values


@cache
def _products(w_bits: int, a_bits: int, odd: bool) -> Callable[[Bytes, int, Integer, Integer, Sums], Sums]:
    """Return a function that multiplies one word of activations by 16 words of weights and adds up the products."""

    @inlined
    def product(w: Vector, a: Vector) -> Vector:
        ones: Vector = count_ones(w ^ a if odd else w & a)
        return ones

    @compiled
    def add(memory: Bytes, weights: int, a0: Integer, a1: Integer, sums: Sums) -> Sums:
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

    return add


@inlined
def _rests(memory: Bytes, place: int, other: int, both: bool) -> Integer:
    """Return the last 16 bits of a part of the window, joined with the last 16 bits of the next part."""
    low = load_half(memory, place)
    return low | load_half(memory, other) << 16 if both else low


@cache
def to_planes(thresholds: int, integers: bool, plane: int) -> ToCodes:
    """Return the function (memory, at, parameters, place, values) that stores the codes of 16 values.

    Args:
        thresholds, integers: arguments of `qbench.deploy.kernel_thresholds.codes_of`.
        plane: number of bytes from the first plane of the output to the second plane.
    """
    codes = codes_of(thresholds, integers)

    @compiled
    def run(memory: Bytes, at: At, parameters: int, place: int, found: Vector) -> None:
        low, high = codes(memory, parameters, found)
        store(memory, place, np.uint16(low))
        if thresholds > 1:
            store(memory, place + plane, np.uint16(high))

    return run
