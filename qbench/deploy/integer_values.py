"""Describes tensors of an integer network, and computes their thresholds and fixed-point formats.

A tensor stores numbers q that stand for the real values clamp(scale * q + shift). Scale and shift are float64, one per
channel. Batch normalization changes only scale and shift, which become part of the thresholds of the next quantizer. It
needs a step only if its input is float64 or has a clamp.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qbench.deploy.integer_network import LARGEST

INT_BITS = 30
"""Fixed-point numbers are at most 2^30, so that the sum of two numbers fits into 32 bits."""

MAX_FRACTION = 40
"""Largest number of fraction bits."""

ROUNDING = 4
"""Largest rounding error of a fixed-point sum of two numbers, in units of its last bit.

Each of the two numbers contributes one unit. Two more units are a safety margin.
"""

MULTIPLIER_BITS, MAX_SHIFT, PRODUCT_BITS = 30, 31, 61
"""Largest sizes in bits: of a multiplier, of a right shift, and of a multiplier times a number."""

Array = np.ndarray


@dataclass(frozen=True)
class Value:
    """A tensor of an integer network.

    Args:
        place: index of the step that computes the tensor. -1 means the image.
        integer: whether q is int32. If false, q is float64 with scale 1 and shift 0.
        scale, shift, low, high: per channel, (C, 1, ...), or per feature, (F,). `low` and `high` are the smallest and
            the largest q that images in the range of the data set can cause.
        floor, ceiling: bounds of the clamp on the real values.
        codes: whether q are the integer levels of a quantizer.
        image: whether the values are the image's pixels, possibly rounded or rearranged.
    """

    place: int
    integer: bool
    scale: Array
    shift: Array
    low: Array
    high: Array
    floor: float = -np.inf
    ceiling: float = np.inf
    codes: bool = False
    image: bool = False

    @property
    def clamped(self) -> bool:
        """Whether the values have a clamp that is not applied to q."""
        return (self.floor, self.ceiling) != (-np.inf, np.inf)

    def interval(self) -> tuple[Array, Array]:
        """Return the smallest and the largest real value of each channel."""
        ends = self.scale * self.low + self.shift, self.scale * self.high + self.shift
        low, high = np.minimum(*ends), np.maximum(*ends)
        return np.clip(low, self.floor, self.ceiling), np.clip(high, self.floor, self.ceiling)

    def clamp(self, low: float, high: float) -> "Value":
        """Return the description of this value after a further clamp to [low, high]."""
        return replace(
            self, floor=min(max(self.floor, low), high), ceiling=min(max(self.ceiling, low), high), codes=False
        )

    def by_channel(self, place: int, change: Callable[[Array], Array]) -> "Value":
        """Return the value as the result of a step that only rearranges channels.

        `change` rearranges a per-channel array in the same way.
        """
        ends = change(self.low), change(self.high)
        return replace(self, place=place, scale=change(self.scale), shift=change(self.shift), low=ends[0], high=ends[1])

    def normalized(self, scale: Array, shift: Array) -> "Value":
        """Return scale * value + shift."""
        return replace(self, scale=self.scale * scale, shift=self.shift * scale + shift, codes=False, image=False)


def real(place: int, low: Array, high: Array, image: bool = False) -> Value:
    """Describe a float64 tensor with the given range of values."""
    return Value(place, False, np.ones_like(low), np.zeros_like(low), low, high, image=image)


def fraction_bits(low: Array, high: Array) -> Array:
    """Return the largest number of fraction bits with which values from low to high fit into fixed point."""
    largest = np.maximum(np.maximum(np.abs(low), np.abs(high)), 2.0 ** (INT_BITS - MAX_FRACTION))
    bits: Array = (INT_BITS - np.ceil(np.log2(largest))).astype(np.int64)
    return bits


def fixed(place: int, low: Array, high: Array, fraction: Array) -> Value:
    """Describe a fixed-point tensor with values from low to high, up to rounding."""
    ends = np.floor(np.ldexp(low, fraction)) - ROUNDING, np.ceil(np.ldexp(high, fraction)) + ROUNDING
    return Value(place, True, np.ldexp(np.ones_like(low), -fraction), np.zeros_like(low), *ends)


def rescaling(value: Value, fraction: Array) -> dict[str, Array]:
    """Return the arrays of a step `rescale` that converts a tensor to fixed point and applies its clamp."""
    factor, offset = np.ldexp(value.scale, fraction), np.ldexp(value.shift, fraction)
    largest = np.maximum(np.abs(value.low), np.abs(value.high))
    # the product with the largest number, plus the offset, must fit into 64 bits
    room = PRODUCT_BITS - np.ceil(np.log2(largest * np.abs(factor) + np.abs(offset) + 2))
    precision = MULTIPLIER_BITS - np.ceil(np.log2(np.abs(factor) + np.ldexp(1.0, -MAX_SHIFT)))
    shift = np.clip(np.minimum(room, precision), 0, MAX_SHIFT).astype(np.int64)
    floor, ceiling = (np.full_like(factor, end) for end in (value.floor, value.ceiling))
    return {
        "multiplier": np.rint(np.ldexp(factor, shift)).astype(np.int64),
        "offset": np.rint(np.ldexp(offset, shift)).astype(np.int64),
        "shift": shift,
        "low": np.clip(np.rint(np.ldexp(floor, fraction)), -LARGEST, LARGEST).astype(np.int64),
        "high": np.clip(np.rint(np.ldexp(ceiling, fraction)), -LARGEST, LARGEST).astype(np.int64),
    }


def integer_thresholds(value: Value, thresholds: Array) -> tuple[Array, Array]:
    """Convert thresholds on real values to thresholds (C, E) on integers. Return them and a sign (C,) per channel.

    Let x be the real value of a channel's integer q. The number of integer thresholds at or below sign * q equals the
    number of `thresholds` at or below x.

    Args:
        thresholds: E ascending thresholds on the real values; (1, E) for all channels, or (C, E) for each channel.
    """
    scale, shift, low, high = (part.reshape(-1, 1) for part in (value.scale, value.shift, value.low, value.high))
    sign = np.where(scale < 0, -1.0, 1.0)
    scale, low, high = scale * sign, np.where(sign < 0, -high, low), np.where(sign < 0, -low, high)
    # the clamp moves values below the floor up to the floor
    edges = np.where(thresholds <= value.floor, -np.inf, np.where(thresholds > value.ceiling, np.inf, thresholds))
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.ceil((edges - shift) / scale)
    first = np.where(scale == 0, np.where(shift >= edges, low, high + 1), np.clip(first, low, high + 1))
    # the division may have rounded to a neighbour of the smallest q that reaches the threshold
    best = first + 1
    for candidate in (first, first - 1):
        best = np.where(scale * candidate + shift >= edges, candidate, best)
    return np.clip(best, low, high + 1).astype(np.int64), sign.reshape(-1).astype(np.int8)
