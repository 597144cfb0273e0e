"""Lists the configuration groups below `conf/` and the options of each group."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qbench.config import registry


def conf_directory() -> Path:
    """Return the folder `conf` of YAML files.

    In a clone, it is next to the package. In an installation, it is inside the package.

    The folder next to the package takes precedence, because an editable installation leaves a stale copy inside the
    package.
    """
    package = Path(__file__).parents[1]
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").exists() else package / "conf"


def option_names(group: str) -> list[str]:
    """Return the options of a group, which are YAML files and entry points of installed packages.

    A file whose name starts with `_` is not an option. Other files of the group include it.
    """
    folder = conf_directory() / group
    paths = [path for path in folder.rglob("*.yaml") if not path.name.startswith("_")]
    files = sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)
    if group == "activation":
        return files + option_names("method")
    return files + (registry.entry_names(group) if group in registry.GROUPS else [])


def option_file(group: str, name: str) -> Path:
    """Return the YAML file of an option of a group."""
    return conf_directory() / group / f"{name}.yaml"


def group_names() -> list[str]:
    """Return the names of the groups. The folder `hydra` is left out, because it contains settings of launchers."""
    return sorted(path.name for path in conf_directory().iterdir() if path.is_dir() and path.name != "hydra")


def format_names(option_names: Iterable[str]) -> str:
    """Return names as one line of text. Names inside a folder are only counted, as in `ttq/... (7)`."""
    counts = Counter("".join(name.partition("/")[:2]) for name in option_names)
    return ", ".join(f"{name}... ({count})" if name.endswith("/") else name for name, count in counts.items())
