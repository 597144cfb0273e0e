"""Replaces the data set, the method or the layer policy of a finished run, according to command-line overrides."""

import copy
import dataclasses
from collections.abc import Sequence

from qbench.config import compose
from qbench.config.schema import Config, Layers, Node
from qbench.errors import ConfigError

METHOD_KEYS = "allowed: layers.KEY=VALUE; method=NAME, alone or with bits=..., activation=NAME and method.KEY=VALUE"


def override_dataset(node: Node, words: Sequence[str]) -> Node:
    """Return the configuration node of the data set that the overrides `words` select.

    If the overrides name no data set, or the run's own, they change keys of the run's data set.

    Raises:
        ConfigError: an override belongs to another group, or is not valid.
    """
    for word in words:
        if _group(word) != "dataset":
            raise ConfigError(f"{word} has no effect on evaluate\nallowed: dataset=NAME and dataset.KEY=VALUE")
    own = f"dataset={node['name']}"
    if any(word.startswith("dataset=") and word != own for word in words):
        return _compose(words).dataset
    composed = _compose([own, *(word for word in words if word != own)]).dataset
    result = copy.deepcopy(dict(node))
    for word in words:
        _, *path = word.partition("=")[0].split(".")
        _copy_value(result, composed, path)
    return result


def _copy_value(target: Node, source: Node, path: Sequence[str]) -> None:
    """Copy the value at a path of keys from one node to another. Nothing is copied if the path is empty."""
    for place, key in enumerate(path):
        if place == len(path) - 1:
            target[key] = source[key]
            return
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target, source = target[key], source[key]


def override_method(config: Config, words: Sequence[str]) -> Config:
    """Return a run's configuration with the method and the layer policy that the overrides select.

    Raises:
        ConfigError: an override belongs to another group, overrides set widths but no method, or
            neither the run nor the overrides have a method.
    """
    groups = {_group(word) for word in words}
    for word in words:
        if _group(word) not in ("method", "activation", "bits", "layers"):
            raise ConfigError(f"{word} has no effect on sensitivity\n{METHOD_KEYS}")
    named = any(word.startswith("method=") for word in words)
    if groups - {"layers"} and not named:
        raise ConfigError(f"{words[0]}: no method is given; add method=NAME\n{METHOD_KEYS}")
    if config.method_name == "float" and not named:
        raise ConfigError("this run is a float run and has no method; add a method, such as method=lsq bits=w4a4")
    if not words:
        return config
    composed = _compose(list(words) if named else [*words, f"method={config.method['name']}"])
    if "layers" in groups:
        config = dataclasses.replace(config, layers=_override_layers(config.layers, composed.layers, words))
    if named:
        config = dataclasses.replace(config, method=composed.method, activation=composed.activation, bits=composed.bits)
    return config


def _override_layers(own: Layers, composed: Layers, words: Sequence[str]) -> Layers:
    """Return a run's layer policy with the typed keys of a composed policy. `layers=...` replaces the whole policy."""
    keys = [word.partition("=")[0].lstrip("+").split(".")[1:] for word in words if _group(word) == "layers"]
    if [] in keys:
        return composed
    changed = {key[0]: getattr(composed, key[0]) for key in keys}
    if "rules" in changed and ["rules"] not in keys:  # single rules were typed, such as layers.rules.conv1=8
        typed, before = dict(composed.rules or {}), own.rules or {}
        # the first rule that matches a layer counts
        changed["rules"] = typed | {key: rule for key, rule in before.items() if key not in typed}
    return dataclasses.replace(own, **changed)


def _group(word: str) -> str:
    """Return the configuration group of an override, such as `layers` for `+layers.first=8`."""
    return word.partition("=")[0].partition(".")[0].lstrip("+")


def _compose(words: Sequence[str]) -> Config:
    (config,) = compose.configurations(list(words))
    return config
