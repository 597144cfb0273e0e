"""Assigns addresses in one array of bytes to the feature maps and parameters of a network."""

from typing import NamedTuple

import numpy as np

from qbench.deploy.kernel_addresses import Strides, Window
from qbench.deploy.kernel_parameters import LANES, whole
from qbench.deploy.kernel_vectors import BYTES

Pair = tuple[int, int]

HALF = LANES // 8
"""Number of bytes in one plane for the codes of one vector of channels."""


class Part(NamedTuple):
    """The windows of a convolution, and the number of consecutive bytes in each part of a window."""

    window: Window
    bytes: int


class Map(NamedTuple):
    """Address and size of a feature map.

    Args:
        address: address of the first pixel. The border is before this address.
        channels, height, width: size of the map.
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
        """Whether the map contains floats, with channels that are not padded to a multiple of 16."""
        return self.strides.pixel == 4 * self.channels != 4 * whole(self.channels)

    def windows(self, kernel: Pair, stride: Pair) -> Window:
        """Return the layout of the windows of a filter. Each pixel of a window is a part."""
        row, pixel = self.strides.row, self.strides.pixel
        return Window(kernel[0], row, kernel[1], pixel, stride[0] * row, stride[1] * pixel)

    def parts(self, kernel: Pair, stride: Pair, dilation: Pair, groups: int, outputs: int) -> Part:
        """Return the windows of a convolution. Consecutive pixels of a row form one part."""
        window = self.windows(kernel, stride)
        window = window._replace(row=dilation[0] * window.row, column=dilation[1] * window.column)
        vectors, pixel = whole(outputs) // LANES, self.strides.pixel
        if groups > 1:
            size = self.channels // groups * self.strides.vector // LANES
            return Part(window._replace(vectors=vectors // groups, group=size), size)
        window = window._replace(vectors=vectors)
        if dilation[1] == 1:
            return Part(window._replace(columns=1, column=0), kernel[1] * pixel)
        return Part(window, pixel)

    def start(self, padding: tuple[int, int]) -> int:
        """Return the address of the first window. This window begins in the border."""
        return self.address - padding[0] * self.strides.row - padding[1] * self.strides.pixel


class Memory:
    """An array of bytes to which maps and constants are added.

    Args:
        border: width in pixels of the border around each map.
    """

    def __init__(self, border: int) -> None:
        self._border, self._size = border, 0
        self._contents, self._addresses = dict[int, np.ndarray](), dict[bytes, int]()

    def _reserve(self, size: int) -> int:
        address = self._size
        self._size += -(-size // BYTES) * BYTES
        return address

    def place(self, array: np.ndarray) -> int:
        """Return the address of a constant. If the memory does not contain the constant yet, add it."""
        content = array.tobytes()
        if content not in self._addresses:
            self._addresses[content] = self._reserve(array.nbytes)
            self._contents[self._addresses[content]] = array
        return self._addresses[content]

    def floats(self, channels: int, height: int, width: int, dense: bool = False) -> Map:
        """Add a map of floats. If `dense` is true, the channels are not padded to a multiple of 16."""
        pixel = 4 * (channels if dense else whole(channels))
        return self._map(channels, height, width, Strides(self._row(width, pixel), pixel, BYTES))

    def planes(self, channels: int, height: int, width: int, planes: int) -> Map:
        """Add a map of codes that are stored as planes of bits. The border has the code 0."""
        pixel = HALF * (whole(channels) // LANES)
        strides = Strides(self._row(width, pixel), pixel, HALF)
        return self._map(channels, height, width, strides._replace(plane=self._plane(height, strides)), planes)

    def tables(self, channels: int, height: int, width: int, border: np.ndarray) -> Map:
        """Add a map of codes that are stored as tables.

        Args:
            border: the table of the code 0, which is stored in the border.
        """
        pixel = 4 * whole(channels)
        new = self._map(channels, height, width, Strides(self._row(width, pixel), pixel, BYTES))
        start = new.start((self._border, self._border))
        self._contents[start] = np.tile(border, self._plane(height, new.strides) // len(border))
        return new

    def _row(self, width: int, pixel: int) -> int:
        return (width + 2 * self._border) * pixel

    def _plane(self, height: int, strides: Strides) -> int:
        # the last pixels are read and written as vectors, which may extend beyond these pixels
        return -(-((height + 2 * self._border) * strides.row + BYTES) // BYTES) * BYTES

    def _map(self, channels: int, height: int, width: int, strides: Strides, planes: int = 1) -> Map:
        address = self._reserve(planes * self._plane(height, strides))
        return Map(address + self._border * (strides.row + strides.pixel), channels, height, width, strides)

    def build(self) -> np.ndarray:
        """Return the array of bytes. It begins at an address that is a multiple of a vector's size."""
        whole_array = np.zeros(self._size + BYTES, np.uint8)
        start = -whole_array.ctypes.data % BYTES
        memory = whole_array[start : start + self._size]
        for address, array in self._contents.items():
            memory[address : address + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        return memory
