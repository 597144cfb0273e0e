"""Composes configurations from `conf/` and the command line. Hydra does the composition."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise, product
from math import prod
from pathlib import Path

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from qbench.config import lr_grid
from qbench.config.groups import conf_directory
from qbench.config.hydra_errors import translate_hydra_error
from qbench.config.hydra_sources import register_sources
from qbench.config.overrides import MOST_COMBINATIONS, check_overrides, refuse_deletions
from qbench.config.schema import Config, Node, did_you_mean
from qbench.config.typed_groups import Composer
from qbench.config.typed_words import as_key_value
from qbench.config.validate import from_node, with_digests
from qbench.errors import ConfigError, QbenchError

MULTIRUN = ("-m", "--multirun")
CONFIG_DIRECTORY = ("--config-dir", "-cd")
PACKAGE = ("--package", "-p")
FLAGS: dict[
    str, tuple[str, ...] | None
] = {  # flag -> allowed values: () if any value is allowed, None if the flag takes no value
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")),
    **dict.fromkeys(("--shell-completion", "-sc")),
    **dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all")),
    **dict.fromkeys(("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys((*PACKAGE, *CONFIG_DIRECTORY), ()),
}
LAUNCHER_KEYS = ("hydra/launcher=", "hydra.launcher.", "+hydra.launcher.", "hydra.sweeper.")
HYDRA_KEYS = (*LAUNCHER_KEYS, "hydra.searchpath=")


def configurations(arguments: list[str]) -> list[Config]:
    """Return the configurations that a command line defines.

    With -m, there is one configuration per combination of values.

    With lr_search=grid, each combination has one configuration per learning rate. The list is empty if Hydra only
    prints something, as with `--cfg job`.

    Raises:
        ConfigError: the command line does not define a valid configuration.
    """
    words = [a for a in arguments if not a.startswith(LAUNCHER_KEYS)]
    nodes: list[DictConfig] = []
    try:
        flags, overrides = sorted_out(words)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"provider=.* is not available")  # a search path that does not exist
            folders = [value for flag, value in pairwise(flags) if flag in CONFIG_DIRECTORY]
            for folder in folders:
                _check_folder(Path(folder))
            sweep = any(flag in MULTIRUN for flag in flags)
            if set(flags) - set(folders) <= {*MULTIRUN, *CONFIG_DIRECTORY, "--run", "-r"}:
                nodes = compose_nodes(overrides, sweep, *folders[-1:])
            elif ("--cfg", "job") in pairwise(["--cfg" if flag == "-c" else flag for flag in flags]) and not sweep:
                _print_job(compose_nodes(overrides, sweep, *folders[-1:])[0], flags)
            else:
                _hydra(words)
    except QbenchError:
        raise
    except Exception as error:  # Hydra's and OmegaConf's own errors, and a user's YAML file that cannot be read
        raise ConfigError(translate_hydra_error(error, arguments)) from None
    configs = [run for node in nodes for run in lr_grid.runs(with_digests(from_node(node)))]
    if any(config.debug for config in configs) and (len(configs) > 1 or {*MULTIRUN} & {*flags}):
        raise ConfigError("debug=true is for a single run: leave out -m and lr_search=grid")
    return configs


def compose_nodes(overrides: list[str], sweep: bool, folder: str | None = None) -> list[DictConfig]:
    """Return one composed configuration for each combination of values.

    Each configuration is composed only once, whereas Hydra's sweeper would compose it twice.

    Args:
        overrides: `KEY=VALUE` words.
        sweep: whether comma-separated values define several combinations.
        folder: the user's own configuration directory.
    """
    register_sources()
    with _instead_of_users_hydra(), hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        if folder is not None:
            path = GlobalHydra.instance().config_loader().get_search_path()
            path.prepend("command-line", f"file://{os.path.abspath(folder)}", SearchPathQuery(provider="schema"))
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides)
        check_overrides(parsed)
        deleted = [word for word in parsed if word.is_delete()]
        composer = Composer()
        if not sweep:
            return [refuse_deletions(deleted, composer.compose(overrides))]
        values = [
            [
                f"{word.get_key_element()}={value}"
                for value in islice(word.sweep_string_iterator(), MOST_COMBINATIONS + 1)
            ]
            if word.is_sweep_override()
            else [word.input_line or ""]
            for word in parsed
        ]
        if prod(map(len, values)) > MOST_COMBINATIONS:
            raise ConfigError(
                f"the sweep has more than {MOST_COMBINATIONS:,} combinations; split it into several sweeps"
            )
        return [refuse_deletions(deleted, composer.compose(words)) for words in product(*values)]


@contextmanager
def _instead_of_users_hydra() -> Iterator[None]:
    """Hide Hydra's global state within a `with` block. The program that calls qbench may itself use Hydra."""
    users = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = users


def _check_folder(folder: Path) -> None:
    """Refuse a user's configuration directory if a file in it differs from the file of the same name in `conf/`.

    Hydra would ignore the user's file.
    """
    if not folder.is_dir():
        raise ConfigError(f"{CONFIG_DIRECTORY[0]} {folder}: no such directory")
    for file in sorted(folder.rglob("*.yaml")):
        own = conf_directory() / file.relative_to(folder)
        if own.is_file() and own.read_bytes() != file.read_bytes():
            raise ConfigError(f"{file}: qbench has a file of this name and would ignore yours; rename your file")


def launcher(arguments: Iterable[str]) -> str | None:
    """Return the launcher that a command line names, such as joblib, or None if it names no launcher."""
    chosen = [a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")]
    return chosen[-1] if chosen and chosen[-1] != "basic" else None


def launcher_keys(arguments: Iterable[str], *defaults: str) -> Node:
    """Return the keys and values of the launcher that a command line names.

    Args:
        arguments: a command line with `hydra/launcher=NAME`. The launcher must exist.
        defaults: `hydra.launcher.KEY=VALUE` words that apply unless the command line has the same key.

    Raises:
        ConfigError: the launcher does not accept a key or value.
    """
    words = [a for a in arguments if a.startswith(LAUNCHER_KEYS)]
    try:
        return _launcher_node(*defaults, *words)
    except Exception as error:  # Hydra's and OmegaConf's own errors
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        named = [word for word in words if word.startswith("hydra/launcher=")]
        known = [key for key in _launcher_node(*named) if not key.startswith("_")]
        allowed = ", ".join(f"hydra.launcher.{key}" if key == known[0] else key for key in known)
        raise ConfigError(f"{' '.join(words)}: {why}\nallowed keys: {allowed}") from None


def _launcher_node(*words: str) -> Node:
    register_sources()
    with _instead_of_users_hydra(), hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        node = hydra.compose("config", ["hydra.job.name=qbench", *words], return_hydra_config=True).hydra.launcher
    keys = OmegaConf.to_container(node, resolve=True)
    assert isinstance(keys, dict)
    return {str(key): value for key, value in keys.items()}


def _print_job(node: DictConfig, flags: Sequence[str]) -> None:
    """Print a configuration or, with the flag --package, one of its nodes, as Hydra's flag `--cfg job` does."""
    package = next((value for flag, value in pairwise(flags) if flag in PACKAGE), None)
    shown = node if package is None else OmegaConf.select(node, package, throw_on_missing=True)
    if shown is None:
        raise ConfigError(f"--package {package}: the configuration has no such key")
    if not isinstance(shown, DictConfig):
        print(shown)
        return
    print(f"# @package {package}\n" * (package is not None) + OmegaConf.to_yaml(shown, resolve="--resolve" in flags))


def _hydra(arguments: list[str]) -> None:
    """Let Hydra print what a flag asks for, such as `--info`."""
    flags, overrides = sorted_out(arguments)
    register_sources()
    typed, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory(prefix="qbench-") as scratch:  # for Hydra's sweep files, which are unused
        sys.argv = ["qbench", *flags, *overrides, f"hydra.sweep.dir={scratch}"]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
        try:
            hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")(lambda node: None)()
        finally:
            sys.argv = typed
            del os.environ["HYDRA_FULL_ERROR"]
            if full_error is not None:
                os.environ["HYDRA_FULL_ERROR"] = full_error


def sorted_out(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a command line into two lists: Hydra's flags with their values, and the overrides.

    Raises:
        ConfigError: a flag or a flag's value is unknown, a flag that takes a value is typed twice, or another argument
            is not `key=value`.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if not word.startswith("-"):
            if not flag or ("=" not in word and not word.startswith("~")):
                typed = as_key_value(word, words)
                fix = f"type {typed}" if typed else "see qbench --help"
                raise ConfigError(f"{word}: not a subcommand and not KEY=VALUE\n{fix}")
            if flag.startswith("hydra") and not word.startswith(HYDRA_KEYS):
                known = ", ".join(key.rstrip("=.") for key in HYDRA_KEYS if key[0] != "+")
                raise ConfigError(f"{word}: qbench does not use this key of Hydra\nallowed keys of Hydra: {known}")
            overrides.append(word)
            continue
        if flag not in FLAGS:
            typed = as_key_value(word, words)
            hint = f"\ntype {typed}" if typed else f"{did_you_mean(flag, FLAGS)}\nsee qbench --help"
            raise ConfigError(f"{word}: no such flag{hint}")
        allowed = FLAGS[flag]
        if allowed is None:
            flags.append(flag)
            continue
        if not value and words and "=" not in words[0] and words[0][:1] not in "-~":
            value = words.pop(0)
        if not value and flag in ("--info", "-i"):
            value = "all"
        if not value or (allowed and value not in allowed):
            raise ConfigError(f"{flag} {value}: must be {', '.join(allowed) or 'a value'}".replace(" :", ":"))
        if flag in flags:
            raise ConfigError(f"{flag} must be typed once")
        flags += [flag, value]
    return flags, overrides
