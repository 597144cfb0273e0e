"""Gives options that are typed on the command line, such as `bits=w8a8`, priority over the keys of an experiment file.

Hydra reads an experiment file after all options, so the keys of the file would change or replace a typed option. For
example, `experiment=lsq/resnet18_w2a2 bits=w8a8` would be a run with 2 bits.
"""

from collections.abc import Sequence

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from qbench.config.groups import group_names

EXPERIMENT = "experiment"


def compose_with_typed_groups(words: Sequence[str]) -> DictConfig:
    """Return the configuration that Hydra composes from overrides, except for groups with a typed option.

    If an option is typed that the experiment file does not choose itself, the node of its group has the values of the
    option and of the keys that are typed, and no values of the experiment file.
    """
    node: DictConfig = hydra.compose("config", list(words))
    chosen = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if chosen.get(EXPERIMENT, "null") == "null":
        return node
    typed = [group for group in chosen if group.partition("@")[0] in group_names() and group != EXPERIMENT]
    if not typed:
        return node
    own = _own_choices(chosen[EXPERIMENT])
    replaced = {group: group.partition("@")[2] or group for group in typed if chosen[group] != own.get(group)}
    inside = tuple(f"{package}." for package in replaced.values())
    keys = [word for word in words if word.partition("=")[0] in replaced or word.lstrip("+").startswith(inside)]
    options = hydra.compose("config", keys)
    with open_dict(node):
        for package in replaced.values():
            value = OmegaConf.to_container(OmegaConf.select(options, package), resolve=False)
            OmegaConf.update(node, package, value, merge=False)
    return node


def _own_choices(experiment: str) -> dict[str, str]:
    """Return the option of each group if nothing but the experiment is typed."""
    words = [f"{EXPERIMENT}={experiment}", "hydra.job.name=qbench"]
    return dict(hydra.compose("config", words, return_hydra_config=True).hydra.runtime.choices)
