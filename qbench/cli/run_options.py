"""Defines the command-line options of the subcommands inspect, sensitivity, evaluate and export.

This module does not import torch, so errors in the options are reported at once.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench.cli import run_parsers
from qbench.cli.arguments import SubcommandParser
from qbench.config.foreign_code import refuse_foreign_code
from qbench.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that most subcommands of this module share: the run's directory, overrides and common flags."""

    run: Path
    overrides: tuple[str, ...] = ()
    format: str = "text"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class InspectOptions(RunOptions):
    """A command line of `qbench inspect`."""

    sort: str = "leave-one-out"
    weights: str = "last"
    images: int = 500
    bn_stats: str = "recompute"


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(RunOptions):
    """A command line of `qbench sensitivity`."""

    budget: str = ""
    measure: str = "loss"
    widths: tuple[int, ...] = tuple(range(1, 9))
    out: str = "bits.yaml"
    images: int = 500
    bn_stats: str = "recompute"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """A command line of `qbench evaluate`."""

    weights: str = "last"
    predictions: Path | None = None
    runtime: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions):
    """A command line of `qbench export`."""

    weights: str = "last"
    to: str = "packed"
    out: Path | None = None


def parse_inspect(arguments: Iterable[str]) -> InspectOptions:
    """Parse a command line of `qbench inspect` (for errors see `_parse`)."""
    return InspectOptions(**_parse(run_parsers.inspect(), arguments, ""))


def parse_sensitivity(arguments: Iterable[str]) -> SensitivityOptions:
    """Parse a command line of `qbench sensitivity` (for errors see `_parse`)."""
    return SensitivityOptions(**_parse(run_parsers.sensitivity(), arguments, "[method=NAME ...] [--budget w=3]"))


def parse_evaluate(arguments: Iterable[str]) -> EvaluateOptions:
    """Parse a command line of `qbench evaluate` (for errors see `_parse`). The run may be an exported file.

    Raises:
        ConfigError: see `_parse`. Also raised if a flag has no effect on an exported file.
    """
    values = _parse(run_parsers.evaluate(), arguments, "[dataset=NAME ...]", takes_file=True)
    options = EvaluateOptions(**values)
    if os.path.isfile(options.run):
        if "weights" in values:
            raise ConfigError("evaluate: --weights has no effect on an exported file, which has one set of weights")
        if options.device not in ("auto", "cpu"):
            raise ConfigError(f"evaluate: --device {options.device}: exported files run on the CPU")
    elif options.runtime:
        raise ConfigError("evaluate: --runtime has no effect on a run; the flag is for exported files")
    return options


def parse_export(arguments: Iterable[str]) -> ExportOptions:
    """Parse a command line of `qbench export` (for errors see `_parse`).

    Raises:
        ConfigError: see `_parse`. Also raised if the file to write has a wrong ending, or its directory does not exist.
    """
    options = ExportOptions(**_parse(run_parsers.export(), arguments, ""))
    ending = ".qbench" if options.to in ("packed", "integer") else ".onnx"
    if options.out and options.out.suffix != ending:
        raise ConfigError(f"export --out {options.out}: must end in {ending} for --to {options.to}")
    if options.out and not options.out.parent.is_dir():
        raise ConfigError(f"export --out {options.out}: no such directory: {options.out.parent}")
    if options.out and options.out.is_dir():
        raise ConfigError(f"export --out {options.out}: is a directory; type the name of a file")
    return options


def _parse(
    parser: SubcommandParser, arguments: Iterable[str], overrides_usage: str, *, takes_file: bool = False
) -> dict[str, Any]:
    """Return the fields of a `RunOptions`.

    Args:
        overrides_usage: the overrides that the subcommand accepts, as text for error messages. It is empty if the
            subcommand accepts no overrides.
        takes_file: whether the run may be a file instead of a directory.

    Raises:
        ConfigError: the command line does not name exactly one run, a flag or value is unknown, an argument is not
            accepted, or the run names code outside qbench and `--trust` is missing.
    """
    words, flags = parser.parse_words(arguments)
    exists = os.path.exists if takes_file else os.path.isdir
    overrides = tuple(word for word in words if "=" in word and not exists(word))
    runs = [word for word in words if word not in overrides]
    if overrides and not overrides_usage:
        raise ConfigError(
            f"{parser.name}: {overrides[0]} has no effect, because the configuration of a finished run is fixed"
        )
    if len(runs) != 1:
        usage = f"qbench {parser.name} RUN {overrides_usage}".rstrip()
        raise ConfigError(f"{parser.name} needs exactly one run directory, found {len(runs)}: {usage}\n{_advice(runs)}")
    if not exists(runs[0]):
        what = "file or directory" if takes_file else "directory"
        raise ConfigError(f"{runs[0]}: no such {what}\n{_advice(runs)}")
    trusted = flags.pop("trust", False)
    if os.path.isdir(runs[0]) and not trusted:
        refuse_foreign_code(Path(runs[0]), runs[0], "to run that code: --trust")
    return {"run": Path(runs[0]), "overrides": overrides} | flags


def _advice(words: Sequence[str]) -> str:
    """Return the line of an error message that says what to type. `words` do not name exactly one run directory."""
    found = [word for word in words if os.path.isdir(word)]
    if len(found) > 1:
        return f"type one of them, such as {found[0]}"
    top = Path(words[0]).parts[0] if words and not Path(words[0]).is_absolute() else ""
    folder = top if top not in ("", ".", "..") and os.path.isdir(top) else "outputs"
    return f"to list the runs below {folder}: qbench list runs" + (f" {folder}" if folder != "outputs" else "")
