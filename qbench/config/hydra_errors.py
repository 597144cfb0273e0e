"""Translates errors of Hydra and OmegaConf into messages of qbench.

A message states what was typed, the nearest existing name, and the allowed values.
"""

import re

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
from qbench.config.typed_words import own_code_hint
from qbench.config.unknown_key import key_paths, unknown_key_message


def translate_hydra_error(error: Exception, arguments: list[str]) -> str:
    """Return qbench's message for an error that Hydra or OmegaConf raised for a command line."""
    for argument in arguments:  # find the group whose value cannot be a name, such as null, 3 or [1]
        key, _, value = argument.partition("=")
        is_option = key in group_names() and ":" not in value  # a user's my.net:build may raise any error
        refused = isinstance(error, TypeError) or "Config group override must be" in str(error)
        if refused and is_option and value not in option_names(key):
            return _missing_option(f"{key}/{value}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(str(error.missing_cfg_file))
    text = str(error).strip()
    if isinstance(error, RecursionError):
        return "the value is nested too deeply or contains itself"
    if several := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text):
        is_option = several[1].partition("=")[0].partition("@")[0] in group_names()
        as_list = "" if is_option else "; for a list, type key=[a,b]"
        return f"{several[1]}: found several values\nfor a sweep, put -m first{as_list}"
    if isinstance(error, OverrideParseException):
        if repeated := re.fullmatch(r"([\w./@]+)==+(.+)", str(error.override), re.DOTALL):
            return f"{error.override}: not valid as KEY=VALUE\ntype {repeated[1]}={repeated[2]}"
        reason = text.splitlines()[0]
        return f"{error.override}: not valid as KEY=VALUE: {reason}\nquote special characters twice: 'key=\"value\"'"
    if isinstance(error, ConfigCompositionException) or isinstance(error.__cause__, OmegaConfBaseException):
        typed = re.search(r"Could not (?:override|append|add|delete)[^']*'([^']+)'", text)
        if typed and (message := _unknown_key(typed[1].lstrip("+~").partition("@")[0], arguments)):
            return message
    return " ".join(text.splitlines()[:2]) or type(error).__name__


def _missing_option(path: str) -> str:
    """Return the message about an option `GROUP/NAME` that does not exist."""
    group, _, name = path.removesuffix(".yaml").partition("/")
    if group == "bits":
        parse_bits(name)
    known = option_names(group)
    if not known:
        return f"{group}={name}: no such group{did_you_mean(group, group_names())}\nallowed: {', '.join(group_names())}"
    own = own_code_hint(group, name)
    hint = "" if own else did_you_mean(name, known)
    return f"{group}={name}: no such {group}{hint}\nallowed: {format_names(known)}{own}"


def _unknown_key(key: str, arguments: list[str]) -> str | None:
    """Return the message about a key that does not exist in the options that the command line selects.

    Return None if the key exists, or if Hydra cannot compose these options.
    """
    chosen = [a for a in arguments if a.partition("=")[0] in group_names() and "," not in a]
    try:
        with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
            tree = OmegaConf.to_container(hydra.compose("config", overrides=chosen))
    except Exception:  # one of the groups is wrong; Hydra's own message says which
        return None
    assert isinstance(tree, dict)
    return None if key in key_paths(tree) else unknown_key_message(key, tree)
