"""Describes where kernels find what they read, and where they write. Addresses and strides are in bytes."""

from typing import NamedTuple


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
        tables: the tables of all codes of 4 channels; see `qbench.deploy.kernel_tables`.
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
    tables: int = 0


class Window(NamedTuple):
    """The part of the input that one output pixel reads: parts of consecutive bytes.

    Args:
        rows: rows of the kernel.
        row: from one row of the kernel to the next.
        columns: parts of one row. It is 1 if all columns of the kernel are consecutive.
        column: from one part of a row to the next.
        down, right: from the window of one output pixel to those of the pixels below and to the right.
        vectors: vectors of output channels that read the same input channels.
        group: from the input channels of these vectors to those of the next.
    """

    rows: int
    row: int
    columns: int
    column: int
    down: int
    right: int
    vectors: int = 1
    group: int = 0


class Strides(NamedTuple):
    """From one row, pixel, vector of channels and plane of a map to the next."""

    row: int
    pixel: int
    vector: int
    plane: int = 0
