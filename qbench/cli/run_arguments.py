"""What is typed behind inspect, sensitivity and evaluate, and what is printed; torch is not imported."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qbench.bits import FLOAT
from qbench.config.schema import did_you_mean
from qbench.errors import ConfigError
from qbench.report.tables.table import FORMATS, Table

Flags = Mapping[str, tuple[str, ...]]
"""Name -> default and the other values allowed; a default alone: any value."""

COMMON: Flags = {"format": tuple(FORMATS), "device": ("auto",)}
MEASURED: Flags = {"images": ("500",), "bn-stats": ("recompute", "keep")}
INSPECT: Flags = {"sort": ("leave-one-out", "leave-one-in", "sqnr", "order"), "weights": ("last", "best"), **MEASURED}
SENSITIVITY: Flags = {
    "budget": ("",), "measure": ("loss", "mse"), "widths": ("1,2,3,4,5,6,7,8",), "out": ("bits.yaml",), **MEASURED
}  # fmt: skip
EVALUATE: Flags = {"predictions": ("",), "weights": ("last", "best")}
PREDICTIONS = (".csv", ".npy")


class RunOptions(NamedTuple):
    """A run's directory, the flags' values and the words KEY=VALUE."""

    run: Path
    flags: dict[str, str]
    words: list[str]

    def whole(self, flag: str) -> int:
        """Return a flag's value as a whole number from 1 on."""
        value = self.flags[flag]
        if not value.isdecimal() or not int(value):
            raise ConfigError(f"--{flag} {value}: allowed is a whole number from 1 on")
        return int(value)

    def widths(self) -> list[int]:
        """Return the widths of --widths, ascending."""
        parts = self.flags["widths"].split(",")
        if not all(part.isdecimal() and 1 <= int(part) < FLOAT for part in parts):
            raise ConfigError(f"--widths {self.flags['widths']}: allowed are numbers from 1 to {FLOAT - 1}, as 2,4,8")
        return sorted({int(part) for part in parts})

    def predictions(self) -> Path | None:
        """Return the file of --predictions, None where none is asked for."""
        name = self.flags["predictions"]
        if name and Path(name).suffix not in PREDICTIONS:
            raise ConfigError(f"--predictions {name}: allowed are files that end in {' or '.join(PREDICTIONS)}")
        if not Path(name).parent.is_dir():
            raise ConfigError(f"--predictions {name}: no such directory: {Path(name).parent}")
        return Path(name) if name else None


def asked(verb: str, arguments: Sequence[str], flags: Flags, *, words: str = "") -> RunOptions:
    """Read a verb's command line.

    Args:
        words: what words KEY=VALUE the verb takes, for errors; none where empty.

    Raises:
        ConfigError: no run, an unknown flag or value, a word that the verb does not take.
    """
    known = {**flags, **COMMON}
    values = {name: allowed[0] for name, allowed in known.items()}
    runs, pairs, rest = [], [], iter(arguments)
    for word in rest:
        if word.startswith("-"):
            name, _, value = word.removeprefix("--").partition("=")
            if name not in known:
                allowed = ", ".join(f"--{flag}" for flag in known)
                raise ConfigError(f"{verb}: no such flag: {word}{did_you_mean(name, known)}\nallowed: {allowed}")
            values[name] = _value(verb, name, value or next(rest, ""), known[name])
        elif "=" in word and not os.path.isdir(word):
            pairs.append(word)
        else:
            runs.append(word)
    if pairs and not words:
        raise ConfigError(f"{verb}: {pairs[0]} has no effect: the run says what it is")
    if len(runs) != 1:
        usage = f"qbench {verb} RUN {words}".rstrip()
        raise ConfigError(f"{verb} wants the directory of one run: {usage}\nqbench list runs names those below outputs")
    if not os.path.isdir(runs[0]):
        raise ConfigError(f"{runs[0]}: no such directory\nqbench list runs names the runs below outputs")
    return RunOptions(Path(runs[0]), values, pairs)


def _value(verb: str, name: str, value: str, allowed: tuple[str, ...]) -> str:
    if not value or (len(allowed) > 1 and value not in allowed):
        choice = ", ".join(allowed) if len(allowed) > 1 else "a value"
        raise ConfigError(f"{verb} --{name} {value}{did_you_mean(value, allowed)}\nallowed: {choice}")
    return value


def shown(asked: RunOptions, tables: Sequence[Table]) -> str:
    """Return tables in the form asked for."""
    return FORMATS[asked.flags["format"]](tables)
