"""Defines dataclass fields for the configuration, with allowed values and the marks `free` and `added`.

A `free` key, such as a device or a folder, cannot change a result. It is therefore never part of a run's identity, the
set of keys by which a stored result is found. An `added` key was introduced after results had been stored. It is part
of a run's identity only if its value differs from the default, so stored results keep their identity and protocol.
"""

import math
import re
from collections.abc import Callable
from dataclasses import field
from typing import TypeVar

from qbench.bits import FLOAT, weight_width
from qbench.errors import ConfigError

T = TypeVar("T")

ACTS = ("auto", "keep", "fused")
HEADS = ("keep", "new")
WIDTHS = f"float, same, a number of bits from 1 to {FLOAT}, or w1 to w{FLOAT} for the weights alone"


def marked(
    default: T,
    holds: Callable[[object], bool] | None = None,
    allowed: str = "",
    *,
    added: bool = False,
    free: bool = False,
) -> T:
    """Return a dataclass field with marks and, optionally, a test of its values.

    Args:
        holds: the test, a function that returns whether a value is allowed.
        allowed: description of the allowed values, for the error message.
        added: whether the key was introduced after results had been stored; see the module's docstring.
        free: whether the key cannot change a result.
    """
    check = {"holds": holds, "allowed": allowed} if holds else {}
    return field(default=default, metadata={**check, "added": added, "free": free})


def within(
    default: T,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    added: bool = False,
    free: bool = False,
) -> T:
    """Return a field for a finite number from `low` to `high`.

    By default, `low` and `high` themselves are allowed. `above` excludes `low`, and `below` excludes `high`.
    """
    text = f"a number {'above' if above else 'from'} {low:.12g}"
    text += f" to {'below ' if below else ''}{high:.12g}" if high < math.inf else " on"

    def holds(x: object) -> bool:
        if not isinstance(x, int | float):
            return False
        finite = isinstance(x, int) or math.isfinite(x)  # an integer can be too large for a float
        return finite and (x < high if below else x <= high) and (x > low if above else x >= low)

    return marked(default, holds, text, added=added, free=free)


def one_of(default: str, *choices: str, added: bool = False, free: bool = False) -> str:
    """Return a field whose value is one of `choices`."""
    return marked(default, lambda x: x in choices, ", ".join(choices), added=added, free=free)


def printable(default: str, *, free: bool = False) -> str:
    """Return a field for text without control characters, such as a path that tables show."""
    allowed = "text of one or more printable characters"
    return marked(default, lambda x: isinstance(x, str) and bool(x) and x.isprintable(), allowed, free=free)


def layer_width(default: int | str) -> int | str:
    """Return a field for the bit width of a layer: `float`, `same` or a number of bits."""
    return marked(default, is_width, WIDTHS)


def image_width(default: int | str) -> int | str:
    """Return a field for the bit width of the input image: `float`, `same` or a number of bits."""
    allowed = f"float, same, or a number of bits from 1 to {FLOAT}"
    return marked(default, lambda x: is_width(x) and weight_width(str(x)) is None, allowed)


def is_width(x: object) -> bool:
    """Return whether x is a layer's bit width: `float`, `same`, a number of bits, or `w8` for 8-bit weights only."""
    if isinstance(x, str):
        return x in ("float", "same") or weight_width(x) is not None
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= FLOAT


def parse_bits(text: str) -> dict[str, int | None]:
    """Parse bit widths such as `w2a2g6`. Widths that the text does not contain are None."""
    match = re.fullmatch(r"(?:w(\d{1,3}))?(?:a(\d{1,3}))?(?:g(\d{1,3}))?", text)
    if not match or not text:
        raise ConfigError(
            f"bits={text}: must be like w2, w2a2 or w2a2g6, with widths from 1 to {FLOAT}\nor type bits.w=2 bits.a=2"
        )
    return {key: int(width) if width else None for key, width in zip("wag", match.groups(), strict=True)}
