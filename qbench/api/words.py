"""Turns the arguments of a Python call into the words of a command line."""

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from pathlib import Path

from qbench.errors import ConfigError

Scalar = str | int | float | bool | Path | None
Value = Scalar | Sequence[Scalar]
"""Type of a keyword argument's value. In a sweep, a list or a range means one run for each of its items."""


def command_words(
    call: str, words: Iterable[str | Path], keys: Mapping[str, Value], flags: Iterable[str] = ()
) -> list[str]:
    """Return positional and keyword arguments as the words of a command line.

    Args:
        call: name of the called function, for error messages.
        words: directories, or `KEY=VALUE` as typed on a command line.
        keys: key -> value.
        flags: the command-line flags that `words` may contain.

    Raises:
        ConfigError: a word is a flag that is not allowed, or a value cannot be typed on a command line.
    """
    typed = [str(word) for word in words]
    for word in typed:
        if word.startswith("-") and word.partition("=")[0] not in flags:
            hint = "; to train several runs, call qbench.sweep" if word in ("-m", "--multirun") else ""
            raise ConfigError(f"{call} {word}: flags of the command line are not allowed in Python{hint}")
    return [*typed, *(f"{key}={as_typed(key, value)}" for key, value in keys.items())]


def as_typed(key: str, value: object) -> str:
    """Return the text to type after `KEY=` for a value. A path is quoted, because it may contain any character.

    Raises:
        ConfigError: the type of the value is not in `Value`.
    """
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Path):
        return "'" + re.sub(r"(\\*)('|\$\{|$)", _escaped, str(value)) + "'"
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, list | tuple | range):
        return ",".join(as_typed(key, item) for item in value)
    raise ConfigError(f"{key}: its value is a {type(value).__name__}; must be a text, number, bool, None, Path or list")


def _escaped(match: re.Match[str]) -> str:
    """Escape a quote, a `${` or the end of a path for Hydra's parser. Preceding backslashes are escaped too."""
    backslashes, found = match.groups()
    return 2 * backslashes + (f"\\{found}" if found else "")
