"""Bit widths of weights, activations and gradients."""

import re
from dataclasses import dataclass
from typing import NamedTuple

FLOAT = 32
"""The bit width of a tensor that is not quantized."""


class Bits(NamedTuple):
    """Widths of weights (w), activations (a) and gradients (g) in bits. A width of 32 means float."""

    w: int = FLOAT
    a: int = FLOAT
    g: int = FLOAT

    def __str__(self) -> str:
        return f"w{self.w}a{self.a}g{self.g}"


def weight_width(text: str) -> int | None:
    """Return the bit width in a text such as `w8` (only weights are quantized), or None for other text."""
    match = re.fullmatch(r"w(\d{1,2})", text)
    return int(match[1]) if match and 1 <= int(match[1]) <= FLOAT else None


@dataclass(frozen=True)
class LevelCount:
    """Number of levels found in a tensor, and number of levels that the tensor's quantizer allows.

    A scale group is a set of values that share a scale. If a tensor has several scale groups, both numbers refer to the
    group with the most levels.
    """

    found: int
    allowed: int
