"""Guesses what a user meant by a command-line argument that is not KEY=VALUE."""

import dataclasses
import os.path
import re
from collections.abc import Sequence

from qbench.config.groups import group_names
from qbench.config.schema import Config, did_you_mean


def as_key_value(word: str, following: Sequence[str] = ()) -> str | None:
    """Return `KEY=VALUE` for a key that was typed in another form, such as `--method lsq` or `method: lsq`.

    Args:
        following: the arguments after `word`. One of them may be the value.

    Returns:
        The text `KEY=VALUE`, or None if the argument is not a key.
    """
    key, _, value = word.lstrip("-").partition("=")
    key = key.rstrip(":")
    known = {field.name for field in dataclasses.fields(Config)} | set(group_names())
    if key.partition(".")[0] not in known:
        return None
    values = [value.strip("="), *following]
    return f"{key}={next((v for v in values if v not in ('', '=')), 'VALUE')}"


def unknown_word_message(word: str, following: Sequence[str], subcommands: Sequence[str]) -> str:
    """Return the message about a word that is neither a subcommand nor KEY=VALUE."""
    if typed := as_key_value(word, following):
        return f"{word}: not a subcommand and not KEY=VALUE\ntype {typed}"
    if word in ("train", "run", "fit"):
        return (
            f"{word}: not a subcommand and not KEY=VALUE\nto train, type only KEY=VALUE, such as: qbench method=dorefa"
        )
    hint = did_you_mean(word, subcommands)
    return f"{word}: not a subcommand and not KEY=VALUE{hint}\nsubcommands: {', '.join(subcommands)}"


def own_code_hint(group: str, name: str) -> str:
    """Return a line that shows how to type a user's own module or image folder, or "" if neither exists.

    `name` is the text that was typed after `GROUP=`.
    """
    if group == "dataset" and os.path.isdir(name):
        return f"\nfor a folder of images, type dataset=folder dataset.root={name}"
    if group not in ("method", "model", "dataset"):
        return ""
    module, _, attribute = re.sub(r"\.py$", "", name).strip("./").replace("/", ".").rpartition(".")
    for own, function in ((f"{module}.{attribute}".strip("."), "FUNCTION"), (module, attribute)):
        if own and os.path.isfile(f"{own.replace('.', '/')}.py"):
            return f"\nfor your own code, type {group}={own}:{function}"
    return ""
