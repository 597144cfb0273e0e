"""The cost of a whole network, as a value that does not need torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Parameters, operations for one image, and bytes of a network.

    `bitops` are MACs x weight bits x activation bits, summed over the layers. `bytes_ideal` stores
    every code at its nominal width, `bytes_packed` in lanes of 1, 2, 4, 8, 16 or 32 bits; both
    include scales and codebooks. `bits_per_weight` is the mean over quantized weights, 32 if there
    are none.
    """

    params: int
    macs: int
    bitops: int
    bytes_float: int
    bytes_ideal: float
    bytes_packed: int
    bits_per_weight: float
