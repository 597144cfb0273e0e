"""Places the maps and parameters of a network in one array of bytes."""

from typing import NamedTuple

import numpy as np

from qbench.deploy.kernel_layers import Strides, Window
from qbench.deploy.kernel_parameters import LANES, whole
from qbench.deploy.kernel_vectors import BYTES

HALF = LANES // 8
"""Bytes of the codes of one vector of channels, in one plane."""


class Map(NamedTuple):
    """Where the values of a map lie.

    Args:
        address: of the first pixel; a border is before it.
        channels, height, width: sizes of the map.
    """

    address: int
    channels: int
    height: int
    width: int
    strides: Strides

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    @property
    def is_dense(self) -> bool:
        """Whether the map has floats without padded channels."""
        return self.strides.pixel == 4 * self.channels != 4 * whole(self.channels)

    def window(self, rows: int, stride: tuple[int, int]) -> Window:
        """Return the windows of a kernel with this number of rows."""
        return Window(rows, self.strides.row, stride[0] * self.strides.row, stride[1] * self.strides.pixel)

    def start(self, padding: tuple[int, int]) -> int:
        """Return the address of the first window."""
        return self.address - padding[0] * self.strides.row - padding[1] * self.strides.pixel


class Memory:
    """Memory under construction.

    Args:
        border: pixels of zeros around each map.
    """

    def __init__(self, border: int) -> None:
        self._border, self._size, self._contents = border, 0, dict[int, np.ndarray]()

    def _reserve(self, size: int) -> int:
        address = self._size
        self._size += -(-size // BYTES) * BYTES
        return address

    def place(self, array: np.ndarray) -> int:
        """Add a constant, and return its address."""
        address = self._reserve(array.nbytes)
        self._contents[address] = array
        return address

    def floats(self, channels: int, height: int, width: int, dense: bool = False) -> Map:
        """Return a new map of floats; `dense` pixels have no padded channels."""
        return self._map(channels, height, width, 4 * (channels if dense else whole(channels)), 1)

    def codes(self, channels: int, height: int, width: int, planes: int) -> Map:
        """Return a new map of codes."""
        return self._map(channels, height, width, HALF * (whole(channels) // LANES), planes)

    def _map(self, channels: int, height: int, width: int, pixel: int, planes: int) -> Map:
        row = (width + 2 * self._border) * pixel
        # the last pixels are read and written in whole vectors, which end after them
        plane = -(-((height + 2 * self._border) * row + BYTES) // BYTES) * BYTES
        address = self._reserve(planes * plane)
        return Map(address + self._border * (row + pixel), channels, height, width, Strides(row, pixel, plane))

    def build(self) -> np.ndarray:
        """Return the memory, which begins at a multiple of the size of a vector."""
        whole_array = np.zeros(self._size + BYTES, np.uint8)
        start = -whole_array.ctypes.data % BYTES
        memory = whole_array[start : start + self._size]
        for address, array in self._contents.items():
            memory[address : address + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        return memory
