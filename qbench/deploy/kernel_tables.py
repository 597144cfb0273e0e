"""Computes convolutions of codes by looking up sums of products in tables.

The codes of 4 channels are stored as a table of 16 bytes, which contains the sum of products for each combination of
four 1-bit weights. A convolution therefore computes no products: the bits of 4 weights are an index into the table, and
one AVX2 instruction (`vpshufb`) looks up 32 sums. Processors without AVX-512 have no instruction that counts ones in
vectors. For planes of bits, these processors need several times as many instructions.

A vector of 16 channels has 4 tables, which take as many bytes as 16 floats. In a map of tables, channels are the last
axis. One row of a convolution's filter therefore reads consecutive tables, always in pairs.

The module `qbench.deploy.kernel_layers` explains kernels, sources and maps.
"""

from functools import cache

import numpy as np

from qbench.deploy.kernel_addresses import At, Window
from qbench.deploy.kernel_compile import compiled, inlined
from qbench.deploy.kernel_parameters import CHANNELS
from qbench.deploy.kernel_thresholds import codes_of
from qbench.deploy.kernel_vectors import (
    BYTES,
    TABLE,
    Bytes,
    Source,
    ToCodes,
    Vector,
    add_halves,
    load_integers,
    load_table,
    load_tables,
    look_up,
    no_bytes,
    splat,
    store,
)

PAIR = 2 * TABLE
"""Number of bytes of a pair of tables. The indices into this pair for 16 output channels need as many bytes."""


def product_tables(a_bits: int, odd: bool) -> np.ndarray:
    """Return the tables (256, 16) of all codes of 4 channels.

    Bits 0 to 3 of the index of a table are the low bits of the codes, and bits 4 to 7 are the high bits. The index
    within a table consists of the bits of 4 weights. The product of a bit of a code and a bit of a weight is their AND,
    or their XOR for odd weights (`qbench.deploy.kernel_planes.planes`).
    """
    numbers, places = np.arange(256)[:, None], np.arange(TABLE)
    planes = [numbers & 15, numbers >> 4][:a_bits]
    products = [plane ^ places if odd else plane & places for plane in planes]
    ones = np.array([place.bit_count() for place in range(TABLE)])
    tables: np.ndarray = np.stack([ones[product] << i for i, product in enumerate(products)]).sum(0).astype(np.uint8)
    return tables


def tables(window: Window, pairs: int, w_bits: int, a_bits: int, odd: bool, unit: int, corrected: bool) -> Source:
    """Return the source of a convolution of codes. The source looks up sums of products in tables, and adds them.

    The result is the same integer as with `qbench.deploy.kernel_planes.planes`.

    Args:
        pairs: pairs of tables in one part of the window.
        w_bits, a_bits: widths of weights and activations in bits, 1 or 2.
    """
    rows, row, columns, column, down, right, vectors, group = window
    parts, step = rows * columns, w_bits * PAIR
    # how many sums can be added within a byte; a larger part of the window is divided, and small parts are joined
    most = 255 // (CHANNELS * (2**a_bits - 1))
    joined, pieces = max(1, most // pairs), -(-pairs // most)
    length = -(-pairs // pieces)
    factor = unit * (2 if odd else -2)

    @compiled
    def values(memory: Bytes, at: At, y: int, x: int, output: int, o: int) -> Vector:
        patch = at.input + y * down + x * right + o // vectors * group
        weights = at.weights + o * (parts * pairs * step)
        low: Vector
        high: Vector
        low, high = splat(np.int32(0)), splat(np.int32(0))
        for first in range(0, parts, joined):
            for piece in range(pieces):
                sum0, sum1 = no_bytes(), no_bytes()
                for p in range(first, min(first + joined, parts)):
                    place = patch + p // columns * row + p % columns * column + piece * length * PAIR
                    for k in range(min(length, pairs - piece * length)):
                        found = load_tables(memory, place + k * PAIR)
                        sum0 = sum0 + look_up(found, load_tables(memory, weights))
                        if w_bits == 2:
                            sum1 = sum1 + look_up(found, load_tables(memory, weights + PAIR))
                        weights += step
                low = low + add_halves(sum0)
                if w_bits == 2:
                    high = high + add_halves(sum1)
        result = splat(np.int32(unit)) * low if unit != 1 else low
        if w_bits == 2:
            result = result + splat(np.int32(factor)) * high
        if corrected:
            result = result + load_integers(memory, at.correction + output * BYTES)
        return result

    return values


@inlined
def _spread(bits: np.int32) -> np.int32:
    """Return 16 bits as 4 bytes of 4 bits."""
    halves = (bits | bits << 8) & 0x00FF00FF
    return (halves | halves << 4) & 0x0F0F0F0F


@cache
def to_tables(thresholds: int, integers: bool) -> ToCodes:
    """Return the function (memory, at, parameters, place, values) that stores the tables of the codes of 16 values.

    Args:
        thresholds, integers: see `qbench.deploy.kernel_thresholds.codes_of`.
    """
    codes = codes_of(thresholds, integers)

    @compiled
    def run(memory: Bytes, at: At, parameters: int, place: int, found: Vector) -> None:
        low, high = codes(memory, parameters, found)
        numbers = _spread(low) | _spread(high) << 4 if thresholds > 1 else _spread(low)
        for i in range(4):
            number = numbers >> (8 * i) & 255
            store(memory, place + i * TABLE, load_table(memory, at.tables + number * TABLE))

    return run
