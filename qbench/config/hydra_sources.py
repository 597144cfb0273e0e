"""Where Hydra finds configurations that are not files below `conf/`: widths, functions, layer rules."""

import re
from pathlib import Path
from types import NoneType
from typing import Any

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from yaml import MarkedYAMLError

from qbench.config import registry
from qbench.config.fields import parse_bits
from qbench.config.groups import option_file
from qbench.errors import ConfigError
from qbench.system.files import read_yaml


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
            return self.is_config(f"method/{name}") or option_file("method", name).is_file()
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
            values = OmegaConf.merge(OmegaConf.load(option_file("layers", "default")), {"rules": _rules(name)})
        elif group == "activation" and option_file("method", name).is_file():
            values = OmegaConf.load(option_file("method", name))
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


def register_sources() -> None:
    """Make our configuration sources known to Hydra."""
    Plugins.instance().register(DynamicConfigSource)
    SourcesRegistry.instance().types["file"] = FileConfigSource  # `register` leaves what is there
