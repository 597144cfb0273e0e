"""Make the reference page of all configuration keys, which `scripts/reference.py` writes.

Types and ranges come from qbench/config/schema.py. Defaults and meanings come from the YAML files in conf/.
"""

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qbench.config import groups, schema
from qbench.config.registry import NOT_ARGUMENTS
from qbench.report.tables.table import Table, markdown

CONF = groups.conf_directory()
SCHEMA_FILES = {"bits": "auto", "layers": "default", "distill": "auto", "runtime": "default", "optim": "unified"}
"""Maps a group of the schema to the option whose values are the defaults."""
NODE_GROUPS = ("model", "dataset", "method")
"""Groups whose keys are arguments of a function."""
TITLES = {"": "Run", "lr_grid": "Grid of learning rates", "pretrain": "Float baseline"}
GENERATED = "<!-- written by scripts/reference.py; to change this page, edit its sources -->"

INTRO = """\
Type a key as `KEY=VALUE` after `qbench`. The command line overrides an experiment file, and an
experiment file overrides the defaults in `conf/`. `qbench ... --cfg job` prints the whole
configuration of a command line and runs nothing. For a group of keys (`model`, `dataset`, `method`,
`activation`, `bits`, `optim`, `layers`, `distill`), type the name of an option, as in `optim=sgd`. You
can then change single keys of the group, as in `optim.lr=0.1`. `optim@pretrain.optim=adam` chooses the
optimizer of the float baseline.

`activation=METHOD` names a second method, which quantizes the activations; `activation.KEY` are its
keys. `experiment=NAME` loads the file `conf/experiment/NAME.yaml`. If you also type an option that the
experiment does not have already (by its own choice or by default), such as `optim=adam` or
`bits=w4a4`, the file's keys in this group do not apply."""

GROUP_TEXTS = {
    "model": "The network: one of the options below, or your own class or function, `model=my_net:Net`.",
    "dataset": "The data: one of the options below, or your own function, `dataset=my_data:build`.",
    "method": "The method: one of the options below, or your own function, `method=my_method:build`.",
}


class Key(NamedTuple):
    """One key of the configuration. `allowed` is empty if every value of the type is allowed."""

    name: str
    type: str
    allowed: str
    default: str
    meaning: str


class Commented(NamedTuple):
    """The content of a YAML file: its first comment, its values, and the comments by `key` or `key.subkey`."""

    description: str
    values: dict[str, Any]
    comments: dict[str, str]


@cache
def read(path: Path) -> Commented:
    """Return the values and comments of a YAML file. A comment may continue on the next lines."""
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(?:#.*\n)*", text)[0].replace("# @package _global_\n", "")
    comments: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    last = ""
    for line in text.splitlines():
        key = re.match(r"(\s*)([\w.@]+):(?:\s+(?:'[^']*'|[^#'\s].*?))?\s*(?:\s#\s(.*))?$", line)
        continued = re.match(r"\s+#\s+(.*)$", line)
        if key:
            indent = len(key[1])
            parents = [parent for parent in parents if parent[0] < indent] + [(indent, key[2])]
            last = ".".join(name for _, name in parents)
            if key[3]:
                comments[last] = key[3]
        elif continued and last:
            comments[last] = f"{comments.get(last, '')} {continued[1]}".strip()
    description = " ".join(line.lstrip("# ") for line in head.splitlines())
    return Commented(description, yaml.safe_load(text) or {}, comments)


def read_option(group: str, name: str) -> Commented:
    """Return the values and comments of an option and of all files that the option includes."""
    path = groups.option_file(group, name)
    file = read(path)
    values, comments = dict(file.values), dict(file.comments)
    for included in values.pop("defaults", ()):
        if included != "_self_":
            shared = read(path.with_name(f"{included}.yaml"))
            values, comments = shared.values | values, shared.comments | comments
    return Commented(file.description, values, comments)


# --- keys of the schema


@cache
def attribute_docstrings() -> dict[tuple[str, str], str]:
    """Return a map from (class, field) to the string below the field in schema.py."""
    texts = {}
    for node in ast.parse(Path(schema.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if is_text and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    texts[node.name, field.target.id] = " ".join(str(after.value.value).split())
    return texts


def schema_keys(cls: type = schema.Config, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a dataclass of the schema. Arguments of models, data sets and methods are not included."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            if name != "pretrain.optim":  # the keys of `optim`
                yield from schema_keys(typing.cast(type, hint), f"{name}.")
        elif name not in (*NODE_GROUPS, "activation"):
            default, meaning = from_yaml(name)
            if default is dataclasses.MISSING:
                default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            meaning = meaning or attribute_docstrings().get((cls.__name__, field.name), "")
            allowed = re.sub(r"a number from (\S+) on$", r"\1 or more", str(field.metadata.get("allowed", "")))
            allowed = allowed.replace("a number from ", "").replace("a number above ", "above ").removesuffix(" on")
            yield Key(name, type_name(hint), allowed, shown(default), meaning)


def from_yaml(name: str) -> tuple[Any, str]:
    """Return the default and the comment of a key of the schema. The default is MISSING if no file has one."""
    group, _, key = name.partition(".")
    if group not in SCHEMA_FILES:
        file = read(CONF / "config.yaml")
        return lookup(file.values, name), file.comments.get(name, "")
    files = [read_option(group, option) for option in options(group)]
    comment = next((file.comments[key] for file in files if key in file.comments), "")
    return lookup(files[0].values, key), comment


def options(group: str) -> list[str]:
    """Return the options of a group of the schema, with the default option first."""
    return sorted(groups.option_names(group), key=lambda name: name != SCHEMA_FILES[group])


def lookup(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        if part not in values:
            return dataclasses.MISSING
        values = values[part]
    return values


def type_name(hint: Any) -> str:
    """Return the name of a type with the terms of YAML, such as `int or null`."""
    if isinstance(hint, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(hint)))
    names = {type(None): "null", dict: "mapping"}
    inner = f" of {typing.get_args(hint)[0].__name__}" if typing.get_origin(hint) is list else ""
    plain = typing.get_origin(hint) or hint
    return names.get(plain, plain.__name__) + inner


def shown(value: Any) -> str:
    """Return a value as typed on the command line."""
    if isinstance(value, str) and value.startswith("${"):
        return f"that of `{value[2:-1]}`"
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    return f"`{text}`" if text else ""


# --- keys of models, data sets and methods


def families(group: str) -> dict[str, list[str]]:
    """Return a map from each family to its options.

    Options of a family share a function, so they have the same keys.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(path.stem for path in (CONF / group).glob("*.yaml")):
        found.setdefault(str(read_option(group, name).values.get("family", name)), []).append(name)
    return found


def node_keys(group: str, names: Sequence[str]) -> Iterator[Key]:
    """Yield the keys of options that share a function. If defaults differ, the default of each option is stated."""
    files = {name: read_option(group, name) for name in names}
    others = [read(path) for path in sorted((CONF / group).glob("*.yaml"))]
    for key in dict.fromkeys(key for file in files.values() for key in file.values):
        if key in NOT_ARGUMENTS and key not in ("recipe", "deviation"):
            continue
        values = {name: file.values[key] for name, file in files.items() if key in file.values}
        same = len({repr(value) for value in values.values()}) == 1
        each = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
        kind = {dict: "mapping", type(None): ""}.get(type(first := next(iter(values.values()))), type(first).__name__)
        meaning = next((file.comments[key] for file in (*files.values(), *others) if key in file.comments), "")
        yield Key(f"{group}.{key}", kind, "", shown(first) if same else each, meaning)


# --- the page


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return markdown([Table(tuple(head), rows=[tuple(row) for row in rows])], links=True)


def configuration_page() -> str:
    """Return the page of all configuration keys."""
    by_section: dict[str, list[Key]] = {}
    for key in sorted(schema_keys(), key=lambda key: "." in key.name):
        by_section.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = ["# Configuration", GENERATED, INTRO]
    for section, keys in by_section.items():
        rows = [(f"`{key.name}`", *key[1:]) for key in keys]
        parts += [
            f"## {TITLES.get(section, f'`{section}`')}",
            table(("key", "type", "allowed", "default", "meaning"), rows),
        ]
        if section in SCHEMA_FILES and len(names := options(section)) > 1:
            parts.append(option_list(section, names))
            parts += [values_by_option(section, names)] if section == "optim" else []
    for group in NODE_GROUPS:
        parts += [f"## `{group}`", GROUP_TEXTS[group]]
        for names in families(group).values():
            parts += [f"### {', '.join(f'`{name}`' for name in names)}", option_list(group, names)]
            nodes = [(f"`{key.name}`", key.type, key.default, key.meaning) for key in node_keys(group, names)]
            parts += [table(("key", "type", "default", "meaning"), nodes)] if nodes else []
    return "\n\n".join(parts) + "\n"


def option_list(group: str, names: Iterable[str]) -> str:
    """Return one bullet per option, with its first comment."""
    return "\n".join(f"- `{group}={name}`: {read_option(group, name).description}" for name in names)


def values_by_option(group: str, names: Sequence[str]) -> str:
    """Return a table of the values that differ between the options of a group."""
    files = [read_option(group, name).values for name in names]
    keys = list(dict.fromkeys(key for values in files for key in values))
    rows = [[shown(values[key]) if key in values else "" for values in files] for key in keys]
    differ = [(f"`{group}.{key}`", *row) for key, row in zip(keys, rows, strict=True) if len(set(row)) > 1]
    return table(("key", *(f"`{name}`" for name in names)), differ)
