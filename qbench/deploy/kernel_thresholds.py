"""Converts values to codes, by comparing the values with thresholds."""

from collections.abc import Callable
from functools import cache

import numpy as np

from qbench.deploy.kernel_compile import compiled
from qbench.deploy.kernel_vectors import BYTES, Bytes, Vector, at_least, load_floats, load_integers, load_word


@cache
def codes_of(thresholds: int, integers: bool) -> Callable[[Bytes, int, Vector], tuple[np.int32, np.int32]]:
    """Return the function (memory, parameters, values) -> (low, high), the bits of the codes of 16 values.

    A code is the number of thresholds at or below a value. In channels in which larger values have smaller codes, a
    code is the number of thresholds above the value. Bit i of `low` and bit i of `high` belong to value i.

    Args:
        thresholds: number of thresholds, 1 to 3.
        integers: whether the source returns integers.
    """
    load = load_integers if integers else load_floats

    @compiled
    def run(memory: Bytes, parameters: int, found: Vector) -> tuple[np.int32, np.int32]:
        falling = load_word(memory, parameters)
        low, high = at_least(found, load(memory, parameters + BYTES)) ^ falling, np.int32(0)
        # one bit per channel; the 1-bits of a higher threshold are a subset of the 1-bits of a lower threshold
        if thresholds > 1:
            high = at_least(found, load(memory, parameters + 2 * BYTES)) ^ falling
            low ^= high
        if thresholds > 2:
            low ^= at_least(found, load(memory, parameters + 3 * BYTES)) ^ falling
        return low, high

    return run
