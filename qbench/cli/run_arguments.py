"""What is typed behind inspect, sensitivity and evaluate, and what is printed; torch is not imported."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qbench.config import compose
from qbench.config.fields import FLOAT
from qbench.config.schema import Config, did_you_mean
from qbench.errors import ConfigError
from qbench.report.tables.table import FORMATS, Table

Flags = Mapping[str, tuple[str, ...]]
"""Name -> default and the other values allowed; a default alone: any value."""

COMMON: Flags = {"format": tuple(FORMATS), "device": ("auto",)}
MEASURED: Flags = {"images": ("500",), "norms": ("anew", "kept")}
INSPECT: Flags = {"sort": ("hurt", "alone", "sqnr", "order"), "weights": ("last", "best"), **MEASURED}
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


def dataset_node(own: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the data set that words name, by keys of their own or, without `dataset=`, by keys of the run's.

    Raises:
        ConfigError: a word of another group, or one that makes no configuration.
    """
    for word in words:
        if _head(word) != "dataset":
            raise ConfigError(f"{word} has no effect on evaluate\nallowed: dataset=NAME and dataset.KEY=VALUE")
    if any(word.startswith("dataset=") for word in words):
        return _composed(words).dataset
    composed = _composed([f"dataset={own['name']}", *words]).dataset
    typed = {word.partition("=")[0].partition(".")[2] for word in words}
    return dict(own) | {key: value for key, value in composed.items() if key in typed}


def method_of(config: Config, words: Sequence[str]) -> Config:
    """Return a run's configuration with the method and the layer policy that words name instead of its own.

    Raises:
        ConfigError: a word of another group, widths without a method, or no method at all.
    """
    allowed = "allowed: method=NAME with bits=..., activation=NAME, method.KEY=VALUE; layers.KEY=VALUE"
    heads = {_head(word) for word in words}
    for word in words:
        if _head(word) not in ("method", "activation", "bits", "layers"):
            raise ConfigError(f"{word} has no effect on sensitivity\n{allowed}")
    named = any(word.startswith("method=") for word in words)
    if heads - {"layers"} and not named:
        raise ConfigError(f"{words[0]}: say by which method: add method=NAME\n{allowed}")
    if config.method_name == "float" and not named:
        raise ConfigError("a float run has no method to quantize by: add method=NAME, and perhaps bits=w4a4")
    if not words:
        return config
    composed = _composed(list(words) if named else [*words, f"method={config.method['name']}"])
    layers = {"layers": composed.layers} if "layers" in heads else {}
    if not named:
        return dataclasses.replace(config, **layers)  # type: ignore[arg-type]
    method = {"method": composed.method, "activation": composed.activation, "bits": composed.bits}
    return dataclasses.replace(config, **method, **layers)  # type: ignore[arg-type]


def _head(word: str) -> str:
    return word.partition("=")[0].partition(".")[0].lstrip("+")


def _composed(words: Sequence[str]) -> Config:
    (config,) = compose.configurations(list(words))
    return config


def shown(asked: RunOptions, tables: Sequence[Table]) -> str:
    """Return tables in the form asked for."""
    return FORMATS[asked.flags["format"]](tables)
