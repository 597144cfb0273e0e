"""Computes the parameters that kernels read: bit planes of integer weights, and thresholds of codes.

Channels are padded to a multiple of 16, the number of channels in a vector. Padded channels have value 0 and code 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qbench.deploy.codes import Encoded
from qbench.deploy.steps import float_of, ordered

LANES = 16
"""Number of channels in a vector (`qbench.deploy.kernel_vectors`)."""

CHANNELS = 4
"""Number of channels of a table (`qbench.deploy.kernel_tables`)."""

TOLERANCE = 1e-4
"""Largest allowed distance between a level and an integer multiple of the scale, as a fraction of the spacing."""

LARGEST = 1e30
"""Largest magnitude of the floats among which thresholds are searched."""


class NoKernel(Exception):
    """Raised if kernels cannot compute a step. The message is a noun phrase that names what kernels do not support."""


class IntegerLevels(NamedTuple):
    """`total` equally spaced levels: (first + step * code) * scale, with one scale per group."""

    first: int
    step: int
    scale: Tensor
    total: int

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return 1 if self.total == 2 else 2


def integer_levels(levels: Tensor) -> IntegerLevels:
    """Return levels (groups, count) as integers times a scale.

    The levels are multiples of their spacing, or odd multiples of half the spacing.

    Raises:
        NoKernel: there are fewer than 2 or more than 4 levels, or the levels are not such multiples.
    """
    count = levels.shape[1]
    if not 2 <= count <= 4:
        raise NoKernel(f"{count} levels; bit-serial kernels need 2 to 4 levels (1 or 2 bits)")
    spacing = (levels[:, -1:] - levels[:, :1]) / (count - 1)
    for step in (1, 2):
        scale = spacing / step
        first = (levels[:, :1] / scale).nan_to_num(0.0)[scale.abs().argmax()].round().item()
        integers = first + step * torch.arange(count)
        if bool(((integers * scale - levels).abs() <= TOLERANCE * spacing.abs()).all()):
            return IntegerLevels(int(first), step, scale[:, 0], count)
    raise NoKernel("levels that are not integers times one scale")


class BitWeights(NamedTuple):
    """Integer weights in bit planes.

    Args:
        integers: the weights divided by their scale, (O, C, H, W).
        scale: scale of each of the O outputs, (O,).
        planes: zeros and ones, (bits, O, C, H, W).
        odd: whether the integers are the sum over i of 2^i * (2 * plane_i - 1). If false, the integers are plane_0 - 2
            * plane_1.
    """

    integers: Tensor
    scale: Tensor
    planes: Tensor
    odd: bool


def bit_weights(weight: Encoded, shape: Sequence[int]) -> BitWeights:
    """Return quantized weights in bit planes.

    Raises:
        NoKernel: the weights have more than 2 bits, or are not integers of this form times one scale per output.
    """
    if weight.layout not in ("tensor", "channel") or weight.levels.values().shape[2] != 1:
        raise NoKernel("weights without one scale per layer or channel")
    first, step, scale, count = integer_levels(weight.levels.values()[..., 0])
    integers = (first + step * weight.numbers()).reshape(tuple(shape))
    scale = scale.expand(shape[0])
    if step == 2 and first == 1 - count and count != 3:
        codes = (integers + count - 1) // 2
        return BitWeights(integers, scale, torch.stack([codes >> i & 1 for i in range(count // 2)]), True)
    if integers.max() > 1:
        integers, scale = -integers, -scale
    if integers.min() < -2 or integers.max() > 1:
        raise NoKernel(f"weights that are integers from {first} to {first + step * (count - 1)}")
    planes = torch.stack([integers & 1, integers >> 1 & 1])
    return BitWeights(integers, scale, planes if planes[1].any() else planes[:1], False)


def pack_planes(planes: Tensor, parts: int) -> np.ndarray:
    """Return weights (bits, O, C, H, W) in the order in which `qbench.deploy.kernel_planes.planes` reads them.

    The result has the shape (vectors of outputs, words, bits, 16) and consists of 32-bit words. A word contains two
    16-bit pieces of a part of the filter. If a part has an odd number of pieces, its last piece shares a word with the
    last piece of the next part.

    Args:
        parts: number of parts of the filter: its rows, or all its pixels.
    """
    padded = _channels_last(planes)
    bits, outputs = padded.shape[:2]
    halves = np.packbits(padded, axis=-1, bitorder="little").view("<u2").reshape(bits, outputs, parts, -1)
    pairs, rest = halves[..., : halves.shape[-1] // 2 * 2], halves[..., halves.shape[-1] // 2 * 2 :]
    flat = np.concatenate([part.reshape(bits, outputs, -1) for part in (pairs, rest)], -1)
    flat = np.pad(flat, ((0, 0), (0, 0), (0, flat.shape[-1] % 2)))
    words = np.ascontiguousarray(flat).view("<u4").reshape(bits, -1, LANES, flat.shape[-1] // 2)
    return np.ascontiguousarray(words.transpose(1, 3, 0, 2))


def pack_places(planes: Tensor) -> np.ndarray:
    """Return weights (bits, O, C, H, W) in the order in which `qbench.deploy.kernel_tables.tables` reads them.

    The result has the shape (vectors of outputs, pairs of tables, bits, 2, 16) and consists of bytes. The bits of 4
    channels form a byte, which is an index into a table.
    """
    padded = _channels_last(planes)
    bits, outputs = padded.shape[:2]
    places = padded.reshape(bits, outputs, -1, CHANNELS) @ np.array([1, 2, 4, 8], np.uint8)
    return np.ascontiguousarray(places.reshape(bits, -1, LANES, places.shape[-1] // 2, 2).transpose(1, 3, 0, 4, 2))


def _channels_last(planes: Tensor) -> np.ndarray:
    """Return weights (bits, O, C, H, W) as (bits, O, H, W, C), with O and C padded to multiples of 16."""
    bits, outputs, channels, rows, columns = planes.shape
    padded = np.zeros((bits, whole(outputs), rows, columns, whole(channels)), np.uint8)
    padded[:, :outputs, ..., :channels] = planes.permute(0, 1, 3, 4, 2).numpy()
    return padded


def pack_floats(weights: Tensor, lanes: int) -> np.ndarray:
    """Return weights (O, C, H, W) in the order in which `qbench.deploy.kernel_layers.floats` reads them.

    Args:
        lanes: number of floats that one pixel of the filter reads.
    """
    outputs, channels, rows, columns = weights.shape
    padded = np.zeros((whole(outputs), rows, columns, lanes), np.float32)
    padded[:outputs, ..., :channels] = weights.permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(padded.reshape(-1, LANES, rows * columns * lanes).transpose(0, 2, 1))


def whole(channels: int) -> int:
    """Return a number of channels, rounded up to a multiple of `LANES`."""
    return -(-channels // LANES) * LANES


class Numbers(NamedTuple):
    """A numbering of the values that a layer can compute. Larger values have larger numbers.

    Args:
        last: the largest number. Thresholds are searched from -last to last.
        value: function from numbers (n, C) to float values.
    """

    last: int
    value: Callable[[Tensor], Tensor]


FLOAT_NUMBERS = Numbers(int(ordered(torch.tensor([LARGEST]))), float_of)
"""The numbering of all floats up to `LARGEST`."""


def code_thresholds(
    function: Callable[[Tensor], Tensor], levels: Tensor, channels: int, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """Find the thresholds (count - 1, C) of codes, and the channels (C,) in which larger values have smaller codes.

    The code of a number is the count of thresholds that are at most this number. In channels in which larger values
    have smaller codes, the code is the count of thresholds above the number.

    Args:
        function: function from floats (count - 1, C) to levels, monotone in each channel.
        levels: the levels of the quantizer, (count,), ascending.
    """
    low = torch.full((len(levels) - 1, channels), -numbers.last)

    def reached(number: Tensor) -> Tensor:
        return function(numbers.value(number)) >= levels[1:, None]

    high = -low
    falling = reached(high).sum(0) < reached(low).sum(0)
    high = high + 1
    while bool((searched := low < high).any()):
        middle = ((low + high) >> 1).clamp(max=numbers.last)
        above = reached(middle) ^ falling
        high = torch.where(searched & above, middle, high)
        low = torch.where(searched & ~above, middle + 1, low)
    return high, falling


def pack_thresholds(thresholds: Tensor, falling: Tensor, integers: bool) -> np.ndarray:
    """Return thresholds as 32-bit words, of shape (number of vectors, 1 + number of thresholds, 16).

    A vector has 16 channels.

    The bits of the first word mark the channels in which larger values have smaller codes.
    """
    count, channels = thresholds.shape
    never = 2**31 - 1 if integers else torch.inf
    padded = np.full((count, whole(channels)), never, np.int32 if integers else np.float32)
    padded[:, :channels] = (thresholds if integers else float_of(thresholds)).numpy()
    result = np.zeros((whole(channels) // LANES, 1 + count, LANES), np.int32)
    result[:, 1:] = padded.view(np.int32).reshape(count, -1, LANES).transpose(1, 0, 2)
    bits = np.zeros(whole(channels), np.uint8)
    bits[:channels] = falling.numpy()
    result[:, 0, 0] = np.packbits(bits, bitorder="little").view("<u2")
    return result


def pack_integers(numbers: Tensor) -> np.ndarray:
    """Return integers (O, H, W) of O outputs as 32-bit words (H, W, vectors of outputs, 16)."""
    outputs, height, width = numbers.shape
    padded = np.zeros((height, width, whole(outputs)), np.int32)
    padded[..., :outputs] = numbers.permute(1, 2, 0).numpy()
    return padded
