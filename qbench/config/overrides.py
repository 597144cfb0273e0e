"""Refuses overrides `KEY=VALUE` and `~KEY` that Hydra would accept although their meaning is unclear."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.types import Override
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf

from qbench.config.groups import group_names, option_file
from qbench.config.registry import GROUPS
from qbench.config.schema import Config, sweep_hint
from qbench.errors import ConfigError
from qbench.system.files import read_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MOST_COMBINATIONS = 10_000
"""Maximum number of combinations in a sweep. A mistyped range could define far more combinations."""


def check_overrides(words: Iterable[Override]) -> None:
    """Refuse several values of one key or several options of one group. Hydra would silently use the last of them.

    Examples are `epochs=1 epochs=2`, a list for a group (`bits=[w2a2,w4a4]`), and two equal keys in braces
    (`layers.rules={conv1: 8, conv1: 4}`). Also refuse `~KEY` if KEY is a group or a key of the schema.
    """
    typed: dict[str, str] = {}
    for word in words:
        key = word.get_key_element().lstrip("+~")
        if word.key_or_group in group_names():
            _refuse_list(key, word)
        line = word.input_line or ""
        if word.is_delete() and (word.key_or_group in group_names() or _schema_field(str(word.key_or_group))):
            raise _removed(word)
        if repeated := _repeated_in_braces(line):
            raise ConfigError(f"{line}: {repeated} must be typed once")
        if key in {f"{group}.source" for group in (*GROUPS, "activation")}:
            raise ConfigError(f"{line}: qbench computes {key} from the content of your file; leave it out")
        if key in typed:
            options = [text.partition("=")[2] for text in (typed[key], line)]
            raise ConfigError(f"{typed[key]} {line}: {key} must be typed once\n{sweep_hint(key, options)}")
        typed[key] = line


def _refuse_list(key: str, word: Override) -> None:
    values = islice(word.sweep_iterator(), MOST_COMBINATIONS) if word.is_sweep_override() else [word.value()]
    for value in values:
        if isinstance(value, list):
            listed = ",".join(map(str, value))
            raise ConfigError(f"{key}=[{listed}]: must be one value, not a list\n{sweep_hint(key, value)}")


def _repeated_in_braces(word: str) -> str | None:
    """Return the first key that is typed twice within the same braces of an override, or None."""
    if "{" not in word:
        return None

    def dictionaries(tree: object) -> Iterator[OverrideParser.DictContainerContext]:
        if isinstance(tree, OverrideParser.DictContainerContext):
            yield tree
        for child in getattr(tree, "children", None) or ():
            yield from dictionaries(child)

    for dictionary in dictionaries(OverrideParser(CommonTokenStream(OverrideLexer(InputStream(word)))).override()):
        keys = [pair.dictKey().getText() for pair in dictionary.dictKeyValuePair()]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            return str(repeated)
    return None


def refuse_deletions(words: Iterable[Override], node: DictConfig) -> DictConfig:
    """Return the composed configuration. Refuse `~GROUP.KEY` if KEY is in the YAML file of the selected option.

    For example, `~model.depth` is refused with `model=resnet20`. Without the key, the function that builds the network,
    data set or method would silently use its default value. Other keys may be removed: an experiment file may have set
    a key that only another option of the group has.
    """
    for word in words:
        group, _, inside = str(word.key_or_group).partition(".")
        file = option_file(group, str(OmegaConf.select(node, f"{group}.name")))
        if file.is_file() and inside in (read_yaml(file) or {}):
            raise _removed(word)
    return node


def _removed(word: Override) -> ConfigError:
    return ConfigError(f"{word.input_line}: this key cannot be removed\n{_instead(str(word.key_or_group))}")


def _instead(key: str) -> str:
    """Return the line of a message that says what to type instead of `~key`."""
    item = _schema_field(key)
    if key in group_names() or item is None:
        return f"type {key}={'NAME' if key in group_names() else 'VALUE'}"
    if "None" in str(item.type):
        return f"to switch it off, type {key}=null"
    allowed = str(item.metadata.get("allowed", ""))
    return f"type {key}=VALUE" + (f"; allowed: {allowed}" if allowed else "")


def _schema_field(key: str) -> dataclasses.Field[object] | None:
    """Return the field of the schema that a dotted key names. Return None if the key is an argument of a function."""
    *groups, name = key.split(".")
    schema: type[DataclassInstance] = Config
    for group in groups:
        found = {item.name: item.type for item in dataclasses.fields(schema)}.get(group)
        if not isinstance(found, type) or not dataclasses.is_dataclass(found):
            return None
        schema = found
    return {item.name: item for item in dataclasses.fields(schema)}.get(name)
