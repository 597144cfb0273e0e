"""Command-line overrides for the analysis of a finished run: another data set, another method."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qbench.config import compose
from qbench.config.schema import Config
from qbench.errors import ConfigError


def dataset_node(own: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the data set that words name, by keys of their own or, without `dataset=`, by keys of the run's.

    Raises:
        ConfigError: a word of another group, or one that makes no configuration.
    """
    for word in words:
        if _head(word) != "dataset":
            raise ConfigError(f"{word} has no effect on evaluate\nallowed: dataset=NAME and dataset.KEY=VALUE")
    if any(word.startswith("dataset=") for word in words):
        return _composed(words).dataset
    composed = _composed([f"dataset={own['name']}", *words]).dataset
    typed = {word.partition("=")[0].partition(".")[2] for word in words}
    return dict(own) | {key: value for key, value in composed.items() if key in typed}


def method_of(config: Config, words: Sequence[str]) -> Config:
    """Return a run's configuration with the method and the layer policy that words name instead of its own.

    Raises:
        ConfigError: a word of another group, widths without a method, or no method at all.
    """
    allowed = "allowed: method=NAME with bits=..., activation=NAME, method.KEY=VALUE; layers.KEY=VALUE"
    heads = {_head(word) for word in words}
    for word in words:
        if _head(word) not in ("method", "activation", "bits", "layers"):
            raise ConfigError(f"{word} has no effect on sensitivity\n{allowed}")
    named = any(word.startswith("method=") for word in words)
    if heads - {"layers"} and not named:
        raise ConfigError(f"{words[0]}: say by which method: add method=NAME\n{allowed}")
    if config.method_name == "float" and not named:
        raise ConfigError("a float run has no method to quantize by: add method=NAME, and perhaps bits=w4a4")
    if not words:
        return config
    composed = _composed(list(words) if named else [*words, f"method={config.method['name']}"])
    layers = {"layers": composed.layers} if "layers" in heads else {}
    if not named:
        return dataclasses.replace(config, **layers)  # type: ignore[arg-type]
    method = {"method": composed.method, "activation": composed.activation, "bits": composed.bits}
    return dataclasses.replace(config, **method, **layers)  # type: ignore[arg-type]


def _head(word: str) -> str:
    return word.partition("=")[0].partition(".")[0].lstrip("+")


def _composed(words: Sequence[str]) -> Config:
    (config,) = compose.configurations(list(words))
    return config
