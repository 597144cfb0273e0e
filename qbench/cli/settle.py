"""Reads the command line of `qbench settle`."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qbench.cli import parsers
from qbench.cli.train import refuse_missing_devices
from qbench.config.foreign_code import refuse_foreign_code
from qbench.config.identity import run_identity
from qbench.config.schema import Config, did_you_mean
from qbench.errors import ConfigError
from qbench.report.comparison.sequential_test import MAX_SEEDS, SequentialTest, setting_name
from qbench.report.comparison.verdicts import MARGIN
from qbench.runs.directory import directory_name


def parse(arguments: Iterable[str]) -> SequentialTest:
    """Parse `SETTING SETTING [--margin X] [--max-seeds N] [hydra/launcher=NAME]`.

    A setting is the directory of a run or a quoted command line.

    Raises:
        ConfigError: the arguments do not have this form, or the two settings cannot be compared.
    """
    words, flags = parsers.settle().parse_words(arguments)
    launchers = [word for word in words if word.startswith("hydra") and " " not in word]
    for word in launchers:
        if word not in parsers.LAUNCHERS:
            allowed = ", ".join(parsers.LAUNCHERS)
            raise ConfigError(
                f"settle {word}: unknown launcher{did_you_mean(word, parsers.LAUNCHERS)}\nallowed: {allowed}"
            )
    settings = [word for word in words if word not in launchers]
    if len(settings) != 2:
        raise ConfigError(
            f"settle needs two settings, found {len(settings)}; a setting is a run directory or a quoted command "
            f"line:\n"
            'qbench settle "method=dorefa bits=w2a2" "method=lsq bits=w2a2"'
        )
    first, second = map(_setting, settings)
    refuse_missing_devices([first.runtime.device, second.runtime.device])
    if run_identity(first).digest == run_identity(second).digest:
        raise ConfigError(f"settle: both settings are {setting_name(first)}; choose two different settings")
    if first.dataset["name"] != second.dataset["name"]:
        names = first.dataset["name"], second.dataset["name"]
        raise ConfigError(
            f"settle: the data sets differ: {names[0]} and {names[1]}\nchoose two settings with the same data set"
        )
    return SequentialTest(
        first=first,
        second=second,
        margin=flags.get("margin", MARGIN),
        max_seeds=flags.get("max_seeds", MAX_SEEDS),
        launcher="".join(word.partition("=")[2] for word in launchers[-1:]),
    )


def _setting(word: str) -> Config:
    """Return the configuration of a setting, with seed 0."""
    config = _from_directory(word) if Path(word).is_dir() else _from_command_line(word)
    if config.debug:
        raise ConfigError(f"settle {word}: the accuracy of a run with debug=true means nothing; leave out debug=true")
    return config


def _from_directory(word: str) -> Config:
    path = Path(word)
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"settle {word}: not a run directory, because it has no config.yaml\ntype a run "
            f"directory or a quoted command line"
        )
    from qbench.runs.stored_config import stored_config

    refuse_foreign_code(path, f"settle {word}", "to run that code, type the quoted command line of this run instead")
    config = stored_config(path)
    folder = directory_name(run_identity(config)).parent.name
    if path.absolute().parent.name != folder:  # the runs with other seeds would not be found next to this run
        raise ConfigError(
            f"settle {word}: the run was moved out of its folder {folder}\n"
            "move it back, or type a command line in quotes in place of the directory"
        )
    config.distill.trust = False  # a stored run must not decide that its teacher's code is trusted
    return replace(config, seed=0, out=str(path.absolute().parents[1]), rerun=False)


def _from_command_line(word: str) -> Config:
    from qbench.config import compose

    try:
        words = shlex.split(word)
    except ValueError as error:
        raise ConfigError(
            f"settle {word}: {str(error).lower()}\ntype all KEY=VALUE arguments in one pair of quotes"
        ) from None
    for typed in words:
        if typed.partition("=")[0] in ("seed", "rerun"):
            raise ConfigError(
                f"settle {word}: {typed} is not allowed, because settle chooses the seeds\nremove {typed}"
            )
    if "=" not in word:
        raise ConfigError(f"settle {word}: not a directory and not a command line\ntype KEY=VALUE arguments in quotes")
    configs = compose.configurations(words)
    if len(configs) != 1:
        raise ConfigError(f"settle {word}: found {len(configs)} settings; allowed: one setting in each pair of quotes")
    return configs[0]
