"""Defines the cost of a whole network. This module does not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Parameters, operations for one image, and bytes of a network.

    `bitops` are MACs x weight bits x activation bits, summed over the layers. `bytes_ideal` is the
    size if every code takes exactly its bit width. `bytes_packed` is the size if every code takes
    1, 2, 4, 8, 16 or 32 bits. Both sizes include scales and codebooks. `bits_per_weight` is the
    mean over quantized weights, or 32 if no weights are quantized. One code can stand for several weights.
    """

    params: int
    macs: int
    bitops: int
    bytes_float: int
    bytes_ideal: float
    bytes_packed: int
    bits_per_weight: float
