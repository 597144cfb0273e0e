"""What a value of the configuration may be: fields with a range or a choice of words, a layer's width, widths."""

import math
import re
from dataclasses import field
from typing import Any

from qbench.errors import ConfigError

FLOAT = 32
"""The width that means: not quantized."""

ACTS = ("auto", "keep", "fused")
WIDTHS = f"float, same or a number of bits from 1 to {FLOAT}"


def within(default: Any, low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """Return a field for a finite number low <= x <= high (low < x with `above`, x < high with `below`)."""
    text = f"a number {'above' if above else 'from'} {low:.12g}"
    text += f" to {'below ' if below else ''}{high:.12g}" if high < math.inf else " on"

    def holds(x: Any) -> bool:
        finite = isinstance(x, int) or math.isfinite(x)  # an integer can be too large for a float
        return bool(finite and (x < high if below else x <= high) and (x > low if above else x >= low))

    return field(default=default, metadata={"holds": holds, "allowed": text})


def one_of(default: Any, *choices: str) -> Any:
    """Return a field for one of some words."""
    return field(default=default, metadata={"holds": lambda x: x in choices, "allowed": ", ".join(choices)})


def printable(default: str) -> Any:
    """Return a field for text without control characters, such as a path that tables show."""
    allowed = "one or more characters that can be printed"
    return field(default=default, metadata={"holds": lambda x: bool(x) and x.isprintable(), "allowed": allowed})


def layer_width(default: str) -> Any:
    """Return a field for a layer's width: float, same or a number of bits."""
    return field(default=default, metadata={"holds": is_width, "allowed": WIDTHS})


def is_width(x: Any) -> bool:
    """Whether x is float, same or a number of bits."""
    return x in ("float", "same") or (isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= FLOAT)


def parse_bits(text: str) -> dict[str, int | None]:
    """Read `w2a2g6`, or some of its parts in this order, into widths; None for what is left out."""
    match = re.fullmatch(r"(?:w(\d{1,3}))?(?:a(\d{1,3}))?(?:g(\d{1,3}))?", text)
    if not match or not text:
        raise ConfigError(
            f"bits={text}: write the widths as w2, w2a2 or w2a2g6, each 1 to {FLOAT}, or bits.w=2 bits.a=2"
        )
    return {key: int(width) if width else None for key, width in zip("wag", match.groups(), strict=True)}
