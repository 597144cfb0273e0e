"""Defines types of flag values for argparse.

A type is a function that converts a text. If the text is not allowed, the function raises an error that states the
allowed values.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from qbench.bits import FLOAT
from qbench.config.schema import did_you_mean

PREDICTION_SUFFIXES = (".csv", ".npy")


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """Return a type for a value that is one of `choices`."""
    names = list(choices)

    def convert(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value}{did_you_mean(value, names)}\nallowed: {', '.join(names)}")
        return value

    return convert


def list_of(choices: Iterable[str] | None = None) -> Callable[[str], tuple[str, ...]]:
    """Return a type for a comma-separated list. If `choices` is given, every item must be one of them."""
    check: Callable[[str], str] = str if choices is None else one_of(choices)

    def convert(value: str) -> tuple[str, ...]:
        parts = tuple(check(part) for part in value.split(",") if part)
        if not parts:
            raise argparse.ArgumentTypeError("needs a value")
        return parts

    return convert


def integer(low: int, high: int | None = None, what: str = "a whole number") -> Callable[[str], int]:
    """Return a type for a whole number n with low <= n <= high."""
    allowed = f"{what} from {low} " + (f"to {high}" if high is not None else "on")

    def convert(value: str) -> int:
        if not (value.isascii() and value.isdecimal()) or len(value) > 18:
            raise argparse.ArgumentTypeError(f"{value}: must be {allowed}")
        if int(value) < low or (high is not None and int(value) > high):
            raise argparse.ArgumentTypeError(f"{value}: must be {allowed}")
        return int(value)

    return convert


def points(value: str) -> float:
    """Convert a margin in percentage points of top-1. It must be above 0 and at most 100."""
    try:
        margin = float(value)
    except ValueError:
        margin = 0.0
    if not 0 < margin <= 100:
        raise argparse.ArgumentTypeError(f"{value}: must be a number of points of top-1 above 0, such as 0.5")
    return margin


def file_with_suffix(*suffixes: str) -> Callable[[str], Path]:
    """Return an argparse type that accepts the name of an output file if it ends in one of `suffixes`."""

    def convert(value: str) -> Path:
        path = Path(value)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{value}: unknown file format\nallowed suffixes: {', '.join(suffixes)}")
        return path

    return convert


def some_text(value: str) -> str:
    """Return the text unchanged. An empty text is refused."""
    if not value:
        raise argparse.ArgumentTypeError("needs a value")
    return value


def some_path(value: str) -> Path:
    """Convert the name of a file to a path. An empty name is refused."""
    return Path(some_text(value))


def weight_widths(value: str) -> tuple[int, ...]:
    """Convert a comma-separated list of bit widths to ascending numbers without repeats."""
    parts = value.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 3 and 1 <= int(part) < FLOAT for part in parts):
        raise argparse.ArgumentTypeError(f"{value}: must be numbers from 1 to {FLOAT - 1}, such as 2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def prediction_file(value: str) -> Path:
    """Convert the name of a file to which predictions are written. The directory of the file must exist."""
    path = Path(value)
    if path.suffix not in PREDICTION_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{value}: must end in {' or '.join(PREDICTION_SUFFIXES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{value}: no such directory: {path.parent}")
    return path
