"""Hydra's error messages in our words: what was typed, the nearest name, what is allowed."""

import re
from typing import Any

import hydra
from hydra.errors import (
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qbench.config.fields import parse_bits
from qbench.config.groups import conf_directory, format_names, group_names, option_names
from qbench.config.schema import did_you_mean


def translate_hydra_error(error: Exception, arguments: list[str]) -> str:
    """Return what one of Hydra's errors means to the person who typed the command line."""
    for argument in arguments:  # a group given a value that is no name at all: null, 3, [1]
        key, _, value = argument.partition("=")
        named = key in group_names() and ":" not in value  # a function of the user's own may raise what it likes
        refused = isinstance(error, TypeError) or "Config group override must be" in str(error)
        if refused and named and value not in option_names(key):
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
    known = option_names(group)
    if not known:
        return f"{group}={name}: no such group{did_you_mean(group, group_names())}\nallowed: {', '.join(group_names())}"
    return f"{group}={name}: no such {group}{did_you_mean(name, known)}\nallowed: {format_names(known)}"


def _unknown_key(key: str, arguments: list[str]) -> str | None:
    """Say that a key does not exist, with its neighbours under the groups that were chosen; None where it exists."""
    parent, _, leaf = key.rpartition(".")
    chosen = [a for a in arguments if a.partition("=")[0] in group_names() and "," not in a]
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
