"""Composing a configuration from `conf/` and the command line: the only importer of Hydra.

Hydra's own errors are reworded here: what was typed, the nearest name, all that is allowed.
"""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from itertools import islice, pairwise, product
from math import prod
from pathlib import Path
from types import NoneType
from typing import Any

import hydra
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from qbench.config import lr_grid as tuning
from qbench.config import registry
from qbench.config.fields import parse_bits
from qbench.config.schema import Config, did_you_mean, to_dict
from qbench.config.validate import from_node
from qbench.errors import ConfigError, QbenchError
from qbench.system.files import read_yaml

FLAGS: dict[str, tuple[str, ...] | None] = {  # flag -> values it takes, () for any, None for none
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")),
    **dict.fromkeys(("--shell-completion", "-sc")),
    **dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all")),
    **dict.fromkeys(("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys(("--package", "-p", "--config-dir", "-cd"), ()),
}
MULTIRUN = ("-m", "--multirun")
CONFIG_DIRECTORY = ("--config-dir", "-cd")
LAUNCHER_KEYS = ("hydra/launcher=", "hydra.launcher.", "+hydra.launcher.", "hydra.sweeper.")
HYDRA_KEYS = (*LAUNCHER_KEYS, "hydra.searchpath=")
MOST_CELLS = 10_000
"""Combinations of a sweep; a mistyped range can ask for any number."""


def conf_directory() -> Path:
    """Return the folder of YAML files: beside the package in a clone, inside it where it was installed.

    In this order, since an editable installation leaves a stale copy inside.
    """
    package = Path(__file__).parents[1]
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").exists() else package / "conf"


def names(group: str) -> list[str]:
    """Return the names that a group offers: its files, and what installed packages bring."""
    folder = conf_directory() / group
    files = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    if group == "activation":
        return files + names("method")
    return files + (registry.entry_names(group) if group in registry.GROUPS else [])


def _file(group: str, name: str) -> Path:
    return conf_directory() / group / f"{name}.yaml"


class FileConfigSource(file_config_source.FileConfigSource):  # type: ignore[misc]
    """Hydra's reader of YAML files, in whose place it stands: a file of the user's that cannot be read is named, and
    the bounds of `read_yaml` hold.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a file below a configuration directory holds."""
        file = Path(self.path) / self._normalize_file_name(config_path)
        if self.provider == "main":
            return super().load_config(config_path)
        values = read_yaml(file)
        if not isinstance(values, dict | NoneType):
            raise ConfigError(f"{file}: holds {values!r}\nallowed are keys and values, such as `epochs: 3`")
        try:
            return super().load_config(config_path)
        except Exception as error:  # what OmegaConf and Hydra's own header ask for on top of YAML
            why = error.problem if isinstance(error, MarkedYAMLError) else str(error).partition("\n")[0]
            raise ConfigError(f"{file}: {why}") from None


class DynamicConfigSource(ConfigSource):  # type: ignore[misc]
    """Configurations that no file of ours holds: `bits/w2a2g6` for any widths, functions named outright,
    `my.net:build`, `activation/NAME`, which is the file of the method, and `layers/@FILE`, the user's own rules.
    """

    @staticmethod
    def scheme() -> str:
        """Return what a search path begins with to name this source."""
        return "unwritten"

    def available(self) -> bool:
        """Always: there is nothing to look for."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether this source serves the group."""
        return config_path in ("bits", "activation", "layers", *registry.GROUPS)

    def is_config(self, config_path: str) -> bool:
        """Whether a path is `bits/` with widths, or `method/`, `model/`, `dataset/` with a function or entry point."""
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        if group == "activation":
            return self.is_config(f"method/{name}") or _file("method", name).is_file()
        if group == "layers":
            return name.startswith("@")
        if group == "bits":
            return bool(re.fullmatch(r"(w\d+)?(a\d+)?(g\d+)?", name)) and bool(name)
        return group in registry.GROUPS and (":" in name or name in registry.entry_names(group))

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the widths that a name spells, or the defaults of the function it names."""
        path = config_path.removesuffix(".yaml")
        group, _, name = path.partition("/")
        if group == "bits":
            values: Any = parse_bits(name)
        elif group == "layers":
            values = OmegaConf.merge(OmegaConf.load(_file("layers", "default")), {"rules": _rules(name)})
        elif group == "activation" and _file("method", name).is_file():
            values = OmegaConf.load(_file("method", name))
        else:
            values = registry.defaults("method" if group == "activation" else group, name)
        header = {"package": group}
        return ConfigResult(provider=self.provider, path=path, config=OmegaConf.create(values), header=header)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing: the names cannot be counted."""
        return []


def _rules(name: str) -> dict[str, Any]:
    """Return the rules of `layers=@FILE`, a YAML file of layer-name patterns and widths; Hydra cuts off `.yaml`."""
    file = Path(name[1:])
    file = file if file.is_file() else Path(f"{file}.yaml")
    try:
        rules = read_yaml(file)
    except OSError as error:
        raise ConfigError(f"layers={name}: cannot read {file}: {error.strerror}") from None
    if not isinstance(rules, dict) or not rules:
        raise ConfigError(f"layers={name}: {file} holds {rules!r}\nallowed are patterns and widths: `layer1.*: 8`")
    return rules


def configurations(arguments: list[str]) -> list[Config]:
    """Return the configuration of a command line, or with -m those of all its combinations, with recipe=tuned one for
    each learning rate; none where the line only asks Hydra to show something (`--cfg job`).

    Raises:
        ConfigError: the command line does not make a configuration.
    """
    words = [a for a in arguments if not a.startswith(LAUNCHER_KEYS)]
    nodes: list[DictConfig] = []
    try:
        flags, overrides = sorted_out(words)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"provider=.* is not available")  # a search path that leads nowhere
            folders = [value for flag, value in pairwise(flags) if flag in CONFIG_DIRECTORY]
            if set(flags) - set(folders) <= {*MULTIRUN, *CONFIG_DIRECTORY, "--run", "-r"}:
                nodes = _composed(overrides, any(flag in MULTIRUN for flag in flags), *folders[-1:])
            else:
                _hydra(words, nodes.append)
    except QbenchError:
        raise
    except Exception as error:  # Hydra's and OmegaConf's own errors, and a YAML file of the user's that cannot be read
        raise ConfigError(translate_hydra_error(error, arguments)) from None
    return [run for node in nodes for run in tuning.runs(from_node(node))]


def _composed(overrides: list[str], sweep: bool, folder: str | None = None) -> list[DictConfig]:
    """Return the nodes of all combinations, without Hydra's own job around each: twice as fast as its sweeper, which
    composes every cell twice. `folder` is a configuration directory of the user's own.
    """
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"{CONFIG_DIRECTORY[0]} {folder}: no such directory")
    _register()
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        if folder is not None:
            path = GlobalHydra.instance().config_loader().get_search_path()
            path.prepend("command-line", f"file://{os.path.abspath(folder)}", SearchPathQuery(provider="schema"))
        if not sweep:
            return [hydra.compose("config", overrides)]
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        values = [
            [f"{word.get_key_element()}={value}" for value in islice(word.sweep_string_iterator(), MOST_CELLS + 1)]
            if word.is_sweep_override()
            else [word.input_line or ""]
            for word in parser.parse_overrides(overrides)
        ]
        if prod(map(len, values)) > MOST_CELLS:
            raise ConfigError(f"a sweep of more than {MOST_CELLS:,} combinations; write it as several")
        return [hydra.compose("config", list(words)) for words in product(*values)]


def _register() -> None:
    Plugins.instance().register(DynamicConfigSource)
    SourcesRegistry.instance().types["file"] = FileConfigSource  # `register` leaves what is there


def launcher(arguments: Iterable[str]) -> str | None:
    """Return the launcher that a command line names, such as joblib; None where jobs run one after the other here."""
    chosen = [a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")]
    return chosen[-1] if chosen and chosen[-1] != "basic" else None


def dispatch(arguments: list[str], job: Callable[[DictConfig], None]) -> None:
    """Let Hydra's launcher call `job` with the node of every run, in its processes; those of one combination's grid of
    learning rates one after the other.
    """

    def each(node: DictConfig) -> None:
        for run in tuning.runs(from_node(node)):
            job(OmegaConf.create(to_dict(run)))

    _hydra(arguments, each)


def _hydra(arguments: list[str], job: Callable[[DictConfig], None]) -> None:
    flags, overrides = sorted_out(arguments)
    _register()
    typed, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory(prefix="qbench-") as scratch:  # Hydra's own notes on a sweep; nobody reads them
        sys.argv = ["qbench", *flags, *overrides, f"hydra.sweep.dir={scratch}"]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed
        try:
            hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")(job)()
        finally:
            sys.argv = typed
            del os.environ["HYDRA_FULL_ERROR"]
            if full_error is not None:
                os.environ["HYDRA_FULL_ERROR"] = full_error


def sorted_out(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Part a command line into Hydra's flags with their values, and overrides: Hydra wants the latter in one piece.

    Raises:
        ConfigError: a flag or a value that does not exist, or a word that is no `key=value`.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if not word.startswith("-"):
            if not flag or ("=" not in word and not word.startswith("~")):
                raise ConfigError(f"{word}: neither a verb nor key=value\nsee qbench --help for the verbs and keys")
            if flag.startswith("hydra") and not word.startswith(HYDRA_KEYS):
                known = ", ".join(key.rstrip("=.") for key in HYDRA_KEYS if key[0] != "+")
                raise ConfigError(f"{word}: has no effect here\nof Hydra's keys, allowed are {known}")
            overrides.append(word)
            continue
        if flag not in FLAGS:
            raise ConfigError(f"{word}: no such flag{did_you_mean(flag, FLAGS)}\nsee qbench --help")
        allowed = FLAGS[flag]
        if allowed is None:
            flags.append(flag)
            continue
        if not value and words and "=" not in words[0] and words[0][:1] not in "-~":
            value = words.pop(0)
        if not value and flag in ("--info", "-i"):
            value = "all"
        if not value or (allowed and value not in allowed):
            raise ConfigError(f"{flag} {value}: allowed is {', '.join(allowed) or 'a value'}".replace(" :", ":"))
        flags += [flag, value]
    return flags, overrides


def translate_hydra_error(error: Exception, arguments: list[str]) -> str:
    """Return what one of Hydra's errors means to the person who typed the command line."""
    for argument in arguments:  # a group given a value that is no name at all: null, 3, [1]
        key, _, value = argument.partition("=")
        named = key in groups() and ":" not in value  # a function of the user's own may raise what it likes
        refused = isinstance(error, TypeError) or "Config group override must be" in str(error)
        if refused and named and value not in names(key):
            return _missing_option(f"{key}/{value}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(str(error.missing_cfg_file))
    text = str(error).strip()
    cause = error.__cause__
    if isinstance(error, RecursionError):
        return "nested too deeply, or made of itself"
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{ambiguous[1]}: several values are a sweep\nput -m in front, or write a list as key=[a,b]"
    if isinstance(error, OverrideParseException):
        why = text.splitlines()[0]
        return f"{error.override}: cannot be read as key=value: {why}\nquote odd characters twice: 'key=\"value\"'"
    if isinstance(error, ConfigCompositionException) or isinstance(cause, OmegaConfBaseException):
        typed = re.search(r"Could not (?:override|append|add|delete)[^']*'([^']+)'", text)
        if typed and (known := _unknown_key(typed[1].lstrip("+~").partition("@")[0], arguments)):
            return known
    return " ".join(text.splitlines()[:2]) or type(error).__name__


def _missing_option(path: str) -> str:
    group, _, name = path.removesuffix(".yaml").partition("/")
    if group == "bits":
        parse_bits(name)
    known = names(group)
    if not known:
        return f"{group}={name}: no such group{did_you_mean(group, groups())}\nallowed: {', '.join(groups())}"
    return f"{group}={name}: no such {group}{did_you_mean(name, known)}\nallowed: {format_names(known)}"


def groups() -> list[str]:
    """Return the configuration's groups."""
    return sorted(path.name for path in conf_directory().iterdir() if path.is_dir())


def _unknown_key(key: str, arguments: list[str]) -> str | None:
    """Say that a key does not exist, with its neighbours under the groups that were chosen; None where it exists."""
    parent, _, leaf = key.rpartition(".")
    chosen = [a for a in arguments if a.partition("=")[0] in groups() and "," not in a]
    try:
        with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
            node: Any = OmegaConf.to_container(hydra.compose("config", overrides=chosen))
    except Exception:  # it is one of those chosen that is wrong
        return None
    for part in parent.split(".") if parent else []:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf in node:
        return None
    known = [f"{parent}.{name}" if parent else name for name in node]
    return f"{key}: no such key{did_you_mean(key, known)}\nallowed: {format_names(known)}"


def format_names(names: Iterable[str]) -> str:
    """Return names in a line, those of a folder as its name with their number."""
    found: dict[str, int] = {}
    for name in names:
        folder, slash, _ = name.partition("/")
        found[folder + slash] = found.get(folder + slash, 0) + 1
    return ", ".join(f"{name}... ({count})" if name.endswith("/") else name for name, count in found.items())
