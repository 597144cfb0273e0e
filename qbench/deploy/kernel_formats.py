"""Defines the two formats in which a map of codes can be stored: planes of bits, and tables of products."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from qbench.deploy.kernel_compile import has
from qbench.deploy.kernel_memory import Map, Memory, Part
from qbench.deploy.kernel_parameters import BitWeights, pack_places, pack_planes
from qbench.deploy.kernel_tables import PAIR, product_tables


class Format(Protocol):
    """Interface of the formats in which a network can store codes."""

    @property
    def tables(self) -> bool:
        """Whether codes are stored as tables, for `qbench.deploy.kernel_layers.Finish`."""

    def new_map(self, memory: Memory, size: tuple[int, int, int], bits: int) -> Map:
        """Add a map of 1-bit or 2-bit codes to the memory, and return the map."""

    def tables_at(self, memory: Memory, bits: int) -> int:
        """Return the address of the tables of codes."""

    def weights(self, weights: BitWeights, part: Part) -> np.ndarray:
        """Return weights in the order in which the source reads them."""

    def source(self, x: Map, part: Part) -> str:
        """Return a call such as `planes(...)` as text, up to the arguments that both formats have in common."""


class Planes(NamedTuple):
    """Stores codes in planes of bits (`qbench.deploy.kernel_planes`)."""

    tables: bool = False

    def new_map(self, memory: Memory, size: tuple[int, int, int], bits: int) -> Map:  # noqa: D102
        return memory.planes(*size, bits)

    def tables_at(self, memory: Memory, bits: int) -> int:  # noqa: D102
        return 0

    def weights(self, weights: BitWeights, part: Part) -> np.ndarray:  # noqa: D102
        return pack_planes(weights.planes, part.window.rows * part.window.columns)

    def source(self, x: Map, part: Part) -> str:  # noqa: D102
        return f"planes({part.window}, {part.bytes // 2}, {x.strides.plane}"


class Tables(NamedTuple):
    """Stores codes in tables (`qbench.deploy.kernel_tables`). All weights have the same `BitWeights.odd`."""

    odd: bool
    tables: bool = True

    def new_map(self, memory: Memory, size: tuple[int, int, int], bits: int) -> Map:  # noqa: D102
        return memory.tables(*size, product_tables(bits, self.odd)[0])

    def tables_at(self, memory: Memory, bits: int) -> int:  # noqa: D102
        return memory.place(product_tables(bits, self.odd))

    def weights(self, weights: BitWeights, part: Part) -> np.ndarray:  # noqa: D102
        return pack_places(weights.planes)

    def source(self, x: Map, part: Part) -> str:  # noqa: D102
        return f"tables({part.window}, {part.bytes // PAIR}"


def tables_are_faster() -> bool:
    """Return whether this processor has vector instructions that look up bytes, but none that count ones."""
    return has("avx2") and not has("avx512vpopcntdq")


def code_format(weights: Iterable[BitWeights]) -> Format:
    """Return the format that is fastest on this processor for a network with the given weights."""
    kinds = {weight.odd for weight in weights}
    return Tables(*kinds) if tables_are_faster() and len(kinds) == 1 else Planes()
