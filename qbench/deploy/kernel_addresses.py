"""Defines the addresses and strides that kernels use, all in bytes.

The module `qbench.deploy.kernel_layers` explains kernels, maps, finishes and ramps.
"""

from typing import NamedTuple


class At(NamedTuple):
    """Addresses in the memory that a kernel reads or writes.

    Args:
        input: first window of the input map.
        weights: vectors of weights, in the order in which the kernel reads them.
        correction: integers that are added to the sums of products, one vector for each vector of the output.
        ramp, second_ramp: parameters of the two functions (`kernel_ramps`) that are applied to the sums one after the
            other.
        residual: map of floats that is added to the values.
        floats: output map of floats.
        thresholds: thresholds of each vector of channels, and bits that mark channels. In a marked channel, larger
            values have smaller codes.
        codes: output map of codes.
        tables: tables for all codes of 4 channels (`qbench.deploy.kernel_tables`).
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
    """Layout of the input that one output pixel reads. This input consists of parts of consecutive bytes.

    Args:
        rows: number of rows of the filter.
        row: stride from one row of the filter to the next row.
        columns: number of parts of one row. If all columns of the filter are consecutive, a row is one part.
        column: stride from one part of a row to the next part.
        down, right: strides from the window of an output pixel to the window of the pixel below, and of the pixel to
            the right.
        vectors: number of vectors of output channels that read the same input channels.
        group: stride from the input channels of these vectors to the input channels of the next vectors.
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
    """Strides of a map: from one row, pixel, vector of channels and plane to the next one."""

    row: int
    pixel: int
    vector: int
    plane: int = 0
