"""Gives options that are typed on the command line, such as `bits=w8a8`, priority over the keys of an experiment file.

Hydra reads an experiment file after all options, so the keys of the file would change or replace a typed option. For
example, `experiment=lsq/resnet18_w2a2 bits=w8a8` would be a run with 2 bits.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from qbench.config.groups import group_names, option_file

EXPERIMENT = "experiment"


class Composer:
    """Composes configurations from overrides. The runs of a sweep use the same object, which remembers common parts."""

    def __init__(self) -> None:
        self._choices, self._options = cache(_choices), cache(_options)

    def compose(self, words: Sequence[str]) -> DictConfig:
        """Return the configuration that Hydra composes from overrides, except for groups with a typed option.

        If an option is typed that the experiment file does not choose itself, the node of its group has the values of
        the option and of the keys that are typed, and no values of the experiment file.

        Args:
            words: the overrides, each with one value.
        """
        node: DictConfig = hydra.compose("config", list(words))
        chosen = {word.partition("=")[0]: word.partition("=")[2] for word in words}
        if chosen.get(EXPERIMENT, "null") == "null":
            return node
        typed = [group for group in chosen if group.partition("@")[0] in group_names() and group != EXPERIMENT]
        file = option_file(EXPERIMENT, chosen[EXPERIMENT])
        if file.is_file():  # one of qbench's files, which have only choices and keys; see `_has_keys`
            typed = [group for group in typed if _has_keys(file, _package(group))]
        own = self._choices(chosen[EXPERIMENT]) if typed else {}
        packages = {group: _package(group) for group in typed if chosen[group] != own.get(group)}
        inside = tuple(f"{package}." for package in packages.values())
        keys = tuple(
            word for word in words if word.partition("=")[0] in packages or word.lstrip("+").startswith(inside)
        )
        with open_dict(node):
            for package in packages.values():
                value = OmegaConf.to_container(OmegaConf.select(self._options(keys), package), resolve=False)
                OmegaConf.update(node, package, value, merge=False)
        return node


def _package(group: str) -> str:
    """Return the place of a group's option in the configuration: `pretrain.optim` for `optim@pretrain.optim`."""
    return group.partition("@")[2] or group


@cache
def _keys(file: Path) -> DictConfig:
    keys = OmegaConf.load(file)
    assert isinstance(keys, DictConfig)
    return keys


def _has_keys(file: Path, package: str) -> bool:
    """Return whether one of qbench's experiment files has keys in a package, besides its choices of options."""
    return OmegaConf.select(_keys(file), package) is not None


def _choices(experiment: str) -> dict[str, str]:
    """Return the option of each group if nothing but the experiment is typed."""
    words = [f"{EXPERIMENT}={experiment}", "hydra.job.name=qbench"]
    return dict(hydra.compose("config", words, return_hydra_config=True).hydra.runtime.choices)


def _options(words: Sequence[str]) -> DictConfig:
    """Return the configuration of typed options without the experiment."""
    node: DictConfig = hydra.compose("config", list(words))
    return node
