"""Finds a command line that produces a stored configuration."""

import copy
import shlex
from collections.abc import Iterator, Mapping

import yaml
from omegaconf import DictConfig, OmegaConf

from qbench.config import compose
from qbench.config.foreign_code import foreign_code
from qbench.config.groups import option_file, option_names
from qbench.config.identity import ADDED, run_identity
from qbench.config.schema import Node, to_dict
from qbench.config.validate import from_dict, from_node, with_digests
from qbench.errors import ConfigError
from qbench.system.files import read_yaml

NODES = {"model": "resnet8", "dataset": "digits", "method": "float", "activation": "none"}
"""Group -> default option. Only groups that store the name of the selected option under `name` are included."""
OPTIMIZERS = {"optim": "optim", "pretrain.optim": "optim@pretrain.optim"}
"""Key of a recipe in the configuration -> the text before `=OPTION` on the command line."""
NOT_TYPED = ("rerun", "claim", "runtime.progress", "distill.trust")


def command_line(values: Node, recorded: Mapping[str, str] | None = None) -> str | None:
    """Return the command line `qbench KEY=VALUE ...` that produces a configuration, or None if there is none.

    The command line names options of groups, and sets each key whose value differs from the options. There is no
    command line for a run of a learning-rate grid, or for a run whose initial checkpoint was deleted. The result is
    also None if the configuration names functions outside qbench, because such functions are not imported here.

    Args:
        recorded: see `run_identity`.
    """
    if foreign_code(values):
        return None
    try:
        config = from_dict(values)
        words = [f"{group}={values[group]['name']}" for group, name in NODES.items() if values[group]["name"] != name]
        words += [] if config.is_baseline else [f"bits={config.bits}"]
        _, differing = _differences(words, values, config.is_baseline)
        for key, word in OPTIMIZERS.items():
            if any(each.startswith(f"{key}.") for each in differing):
                words.append(f"{word}={_nearest_option(_at(values, key))}")
        node, differing = _differences(words, values, config.is_baseline)
        words += [f"{'' if _has(node, key) else '+'}{key}={_text(value)}" for key, value in differing.items()]
        (again,) = compose.configurations(words)
        same = run_identity(again).digest == run_identity(config, recorded).digest
    except ConfigError:
        return None
    return f"qbench {shlex.join(words)}" if same else None


def _counts(key: str, is_baseline: bool) -> bool:
    """Return whether a key that differs from its default must be typed.

    For a float baseline, the keys `optim`, `epochs`, `init` and `layers` are not typed. Its recipe is under `pretrain`.
    """
    return key not in NOT_TYPED and not (is_baseline and key.startswith(("optim.", "epochs", "init", "layers.")))


def _differences(words: list[str], values: Node, is_baseline: bool) -> tuple[DictConfig, Node]:
    """Return the configuration that Hydra composes from `words`, and the entries of `values` that differ from it."""
    (node,) = compose.compose_nodes(words, sweep=False)
    found = dict(_leaves(to_dict(with_digests(from_node(copy.deepcopy(node))))))
    differing = {
        key: value for key, value in _leaves(values) if found.get(key, "") != value and _counts(key, is_baseline)
    }
    return node, differing


def _leaves(values: Mapping[str, object], place: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted keys with their values.

    All layer rules together are one value, because their patterns contain dots.
    """
    for name, value in values.items():
        key = f"{place}{name}"
        if isinstance(value, Mapping) and key != "layers.rules" and name != ADDED:
            yield from _leaves(value, f"{key}.")
        elif name != ADDED:
            yield key, value


def _at(values: Node, key: str) -> Node:
    for part in key.split("."):
        values = values[part]
    return values


def _nearest_option(recipe: Mapping[str, object]) -> str:
    """Return the option of `optim` that shares the most values with a recipe."""

    def score(name: str) -> int:
        own = read_yaml(option_file("optim", name))
        fixed = {key: value for key, value in own.items() if key != "defaults" and "${" not in str(value)}
        return sum(1 if recipe.get(key) == value else -1 for key, value in fixed.items())

    return max(option_names("optim"), key=score)


def _has(node: DictConfig, key: str) -> bool:
    """Return whether a composed configuration contains a key. A key that it lacks must be typed with a `+`."""
    place, _, name = key.rpartition(".")
    parent = OmegaConf.select(node, place) if place else node
    return parent is not None and name in parent


def _text(value: object) -> str:
    """Return a value as typed on the command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
