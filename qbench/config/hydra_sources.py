"""Supplies Hydra with configurations that have no file in `conf/`.

These are bit widths, the user's own functions and layer rules.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from yaml import MarkedYAMLError

from qbench.config import registry
from qbench.config.fields import parse_bits
from qbench.config.groups import option_file
from qbench.config.schema import Node
from qbench.errors import ConfigError
from qbench.system.files import read_yaml

SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML's loader in C is absent from some builds


class OwnYaml(SafeLoader):  # type: ignore[misc,valid-type]
    """Reads the YAML files of `conf/` ten times as fast as OmegaConf.

    As in OmegaConf, 1e-4 is a number, and a date is text.
    """

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers


LAUNCH = "type it on the command line: hydra/launcher=NAME, hydra.launcher.KEY=VALUE"


class FileConfigSource(file_config_source.FileConfigSource):  # type: ignore[misc]
    """Hydra's reader of YAML files, with limits on size and with errors that name the file."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the content of a YAML file in a configuration directory."""
        file = Path(self.path) / self._normalize_file_name(config_path)
        if self.provider == "main":
            result = self._load_own(file)
            if config_path not in ("config", "config.yaml"):
                _refuse_ignored(file, result.config)
            return result
        values = read_yaml(file)
        if not isinstance(values, dict | NoneType):
            raise ConfigError(f"{file}: contains {values!r}\nallowed: keys and values, such as `epochs: 3`")
        _refuse_ignored(file, values or {})
        try:
            return super().load_config(config_path)
        except Exception as error:  # Hydra and OmegaConf refuse some files that are valid YAML
            why = error.problem if isinstance(error, MarkedYAMLError) else str(error).partition("\n")[0]
            raise ConfigError(f"{file}: {why}") from None

    def _load_own(self, file: Path) -> ConfigResult:
        config = OmegaConf.create(read_yaml(file, OwnYaml) or {})
        header = self._get_header_dict(file.read_text(encoding="utf-8")[:512])
        return ConfigResult(config=config, path=f"file://{self.path}", provider=self.provider, header=header)


class DynamicConfigSource(ConfigSource):  # type: ignore[misc]
    """Makes configurations when Hydra requests them by name.

    It supports these names: `bits/w2a2g6` with any widths; a user's own function, such as `model/my.net:build`;
    `activation/NAME` for the activations of the method NAME; and `layers/@FILE` for a user's layer rules.
    """

    @staticmethod
    def scheme() -> str:
        """Return the scheme that names this source in a search path."""
        return "dynamic"

    def available(self) -> bool:
        """Return True, because this source needs neither a file nor a network connection."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return whether this source can make configurations of the group."""
        return config_path in ("bits", "activation", "layers", *registry.GROUPS)

    def is_config(self, config_path: str) -> bool:
        """Return whether this source can make the configuration that a path names."""
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        if group == "activation":
            return self.is_config(f"method/{name}") or option_file("method", name).is_file()
        if group == "layers":
            return name.startswith("@")
        if group == "bits":
            return bool(re.fullmatch(r"(w\d+)?(a\d+)?(g\d+)?", name)) and bool(name)
        return group in registry.GROUPS and (":" in name or name in registry.entry_names(group))

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the configuration that a path names."""
        path = config_path.removesuffix(".yaml")
        group, _, name = path.partition("/")
        config = _configuration(group, name)
        return ConfigResult(provider=self.provider, path=path, config=config, header={"package": group})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return an empty list, because there are infinitely many names."""
        return []


def _refuse_ignored(file: Path, values: Mapping[str, object]) -> None:
    """Refuse entries that Hydra would silently ignore.

    These entries are keys of Hydra itself, and lists of options. Hydra would use only the last option of a list.
    """
    if "hydra" in values:
        raise ConfigError(f"{file}: `hydra:` has no effect in a file\n{LAUNCH}")
    entries = values.get("defaults") or ()
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ConfigError(f"{file}: defaults must be a list, not {entries!r}")
    for entry in entries:
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            if str(key).removeprefix("override ").lstrip("/").startswith("hydra/"):
                raise ConfigError(f"{file}: `{key}: {value}` has no effect in a file\n{LAUNCH}")
            if isinstance(value, Sequence) and not isinstance(value, str):
                raise ConfigError(f"{file}: `{key}: {value}` must be one value, not a list")


def _configuration(group: str, name: str) -> DictConfig | ListConfig:
    if group == "bits":
        return OmegaConf.create(parse_bits(name))
    if group == "layers":
        return OmegaConf.merge(OmegaConf.load(option_file("layers", "default")), {"rules": _rules(name)})
    if group == "activation":
        file = option_file("method", name)
        return OmegaConf.load(file) if file.is_file() else OmegaConf.create(registry.defaults("method", name))
    return OmegaConf.create(registry.defaults(group, name))


def _rules(name: str) -> Node:
    """Return the layer rules in the file of `layers=@FILE`. The rules map layer-name patterns to bit widths.

    Hydra removes the suffix `.yaml` from the typed file name.
    """
    file, with_suffix = Path(name[1:]), Path(f"{name[1:]}.yaml")
    if file.is_file() and with_suffix.is_file():
        raise ConfigError(f"layers={name}: there are two such files, {file} and {with_suffix}; rename one of them")
    file = file if file.is_file() else with_suffix
    try:
        rules = read_yaml(file)
    except OSError as error:
        raise ConfigError(f"layers={name}: cannot read {file}: {error.strerror}") from None
    if not isinstance(rules, dict) or not rules:
        raise ConfigError(
            f"layers={name}: {file} contains {rules!r}\nallowed: patterns and widths, such as `layer1.*: 8`"
        )
    return rules


def register_sources() -> None:
    """Register `FileConfigSource` and `DynamicConfigSource` with Hydra."""
    Plugins.instance().register(DynamicConfigSource)
    SourcesRegistry.instance().types["file"] = FileConfigSource  # `register` would keep Hydra's own reader of files
