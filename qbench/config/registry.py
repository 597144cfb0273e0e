"""Maps names to functions that build methods, models and data sets.

A name is one of three things: a file below `qbench/<group>/` with a function `build`, an entry point of another package
in the group `qbench.<group>`, or a user's `package.module:function`. A configuration node contains a name and the
keyword arguments of its function. A key has the type of the argument's default. If the argument is annotated with a
union of types, a list in it is allowed too.
"""

import ast
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Container, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from qbench.config.schema import Node, did_you_mean
from qbench.config.users_modules import import_current
from qbench.errors import ConfigError, QbenchError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

GROUPS = {"method": "methods", "model": "models", "dataset": "data"}
ENTRY_POINTS = {"method": "qbench.methods", "model": "qbench.models", "dataset": "qbench.datasets"}
RECIPE = {"pretrain": 60, "finetune": 30, "lr": 1e-3, "lr_end": 1e-5}
"""Epochs and Adam's learning rates for a user's data set without a recipe in YAML."""

NOT_ARGUMENTS = ("name", "family", "recipe", "source", "deviation", "added")
"""Keys of a node that are not arguments of the function that the node names."""

Factory = Callable[..., Any]


def names(group: str) -> list[str]:
    """Return the names in a group: those of qbench first, then those of other packages.

    Users' own functions are not included.
    """
    folder = Path(__file__).parents[1] / GROUPS[group]
    return sorted(path.stem for path in folder.glob("*.py") if _defines_build(path)) + entry_names(group)


def entry_names(group: str) -> list[str]:
    """Return the names that other installed packages register."""
    return sorted(entry.name for entry in _entry_points(group))


def _entry_points(group: str) -> "EntryPoints":
    """Return what other installed packages register for a group."""
    from importlib.metadata import entry_points  # takes as long as a tenth of a stored row

    return entry_points(group=ENTRY_POINTS[group])


@cache
def card(name: str) -> str:
    """Return a method's card (the docstring of its module) without importing qbench's modules.

    Raises:
        ConfigError: the method does not exist.
    """
    path = Path(__file__).parents[1] / GROUPS["method"] / f"{name}.py"
    if name.isidentifier() and path.exists():
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return inspect.getdoc(inspect.getmodule(find("method", name))) or ""


def widths(name: str) -> str:
    """Return which widths of w, a and g a method has, without importing its module.

    A method outside qbench is taken to have all three.
    """
    path = Path(__file__).parents[1] / GROUPS["method"] / f"{name}.py"
    if not name.isidentifier() or not path.exists():
        return "wag"
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    arguments = next(f.args.kwonlyargs for f in functions if f.name == "build")
    return "".join(argument.arg for argument in arguments if argument.arg in ("w", "a", "g"))


def known_deviations(name: str) -> dict[str, tuple[str, str]]:
    """Return deviation -> (description, source) for a method, without importing its module."""
    path = Path(__file__).parents[1] / "deviations" / f"{name}.py"
    if not name.isidentifier() or not path.exists():
        return {}
    constants: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
    table = constants["DEVIATIONS"]
    assert isinstance(table, ast.Dict)

    def text(expression: ast.AST | None) -> str | None:
        if isinstance(expression, ast.Name) and expression.id in constants:
            return text(constants[expression.id])
        if isinstance(expression, ast.FormattedValue):
            return text(expression.value)
        if isinstance(expression, ast.JoinedStr):
            return "".join(text(part) or "" for part in expression.values)
        return expression.value if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else None

    deviations = {}
    for key, call in zip(table.keys, table.values, strict=True):
        assert isinstance(call, ast.Call)
        *_, description, source = (words for argument in call.args if (words := text(argument)) is not None)
        deviations[text(key) or ""] = (description, source)
    return deviations


def sections(card: str) -> dict[str, str]:
    """Return heading -> text of a card.

    A heading is a single unindented word above indented text.
    """
    texts: dict[str, str] = {}
    for block in card.split("\n\n"):
        heading, _, text = block.partition("\n")
        if heading.isalpha() and text.startswith("    "):
            texts[heading] = inspect.cleandoc(text)
    return texts


def find(group: str, name: str) -> Factory:
    """Return the function that a name refers to.

    Raises:
        ConfigError: the name does not exist, or its module cannot be imported.
    """
    if ":" in name:
        return _users_function(group, name)
    if name.isidentifier() and find_spec(f"qbench.{GROUPS[group]}.{name}"):
        build: Factory = importlib.import_module(f"qbench.{GROUPS[group]}.{name}").build
        return build
    for entry in _entry_points(group).select(name=name):
        return entry.load()  # type: ignore[no-any-return]
    known = names(group)
    raise ConfigError(f"{group}={name}: no such {group}{did_you_mean(name, known)}\nallowed: {', '.join(known)}")


def create(group: str, node: Mapping[str, Any], *positional: object, **fixed: object) -> Any:
    """Call the function that a node names, with the node's other keys as arguments.

    Args:
        node: `name`, arguments of the function, and optionally `family`, which is the file if several names share one.
        positional: positional arguments of the function.
        fixed: keyword arguments. Those that the function does not take are ignored.

    Raises:
        ConfigError: the function does not take a key, or a value has the wrong type or is out of
            range.
    """
    factory, options, known = checked(group, node, fixed)
    try:
        return factory(*positional, **options, **{key: value for key, value in fixed.items() if key in known})
    except ValueError as error:
        raise ConfigError(f"{group}.{error}") from None


def checked(group: str, node: Mapping[str, Any], fixed: Container[str] = ()) -> tuple[Factory, Node, Collection[str]]:
    """Return a node's function, the keyword arguments in the node, and the names of all arguments.

    Raises:
        ConfigError: the function does not take a key, a key is in `fixed`, or a value has the wrong
            type.
    """
    name = str(node["name"])
    factory = find(group, str(node.get("family", name)))
    options = {key: value for key, value in node.items() if key not in NOT_ARGUMENTS}
    known = {key: p for key, p in inspect.signature(factory).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known or key in fixed:
            allowed = [f"{group}.{k}" for k in known if k not in fixed]
            hint = did_you_mean(f"{group}.{key}", allowed)
            raise ConfigError(f"{group}.{key}: {name} has no such key{hint}\nallowed: {', '.join(allowed) or 'none'}")
        default = known[key].default
        if not (_same_type(value, default) or (isinstance(value, list) and _takes_list(known[key].annotation))):
            raise ConfigError(f"{group}.{key}={value}: must be {_kind(default)}, such as {default}")
    return factory, options, known


def defaults(group: str, name: str) -> Node:
    """Return the node of a function without a YAML file, made from the arguments' defaults."""
    node: Node = {}
    for key, parameter in inspect.signature(find(group, name)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            node[key] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    if group == "method":
        node["bits"] = "".join(f"{key}{node.pop(key)}" for key in "wag" if key in node) or "w32"
        node |= _requirements(find(group, name))
    if group == "model":
        node |= {"act": "auto"} | ({"norm": "auto"} if "norm" in node else {})
    if group == "dataset":
        node["recipe"] = dict(RECIPE)
    if ":" in name:  # the content of the user's file also affects the result
        spec = find_spec(name.partition(":")[0])
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            node["source"] = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]
    return {"name": name} | node


def _requirements(factory: Factory) -> dict[str, str]:
    """Return the keys `init` and `distill` for a method without a YAML file.

    The keys follow from `Method.requires`.
    """
    unset = [p for p in inspect.signature(factory).parameters.values() if p.default is p.empty]
    try:
        requires = factory(**{p.name: 32 for p in unset}).requires
    except Exception:  # the same error is raised, and reported, when the method is built
        return {}
    start = {"init": "scratch"} if requires.start == "scratch" else {}
    return start | ({"distill": "kd"} if requires.teacher else {})


def _users_function(group: str, name: str) -> Factory:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # the user's file may be in the working directory
        sys.path.insert(0, os.getcwd())
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ConfigError(f"{group}={name}: not a valid name; for your own function, type package.module:function")
    try:
        function: Factory | None = getattr(import_current(module), attribute, None)
    except ImportError as error:
        raise ConfigError(f"{group}={name}: {error}; searched {os.getcwd()} and the installed packages") from None
    except Exception as error:
        raise QbenchError(f"{group}={name}: error in your own code: {type(error).__name__}: {error}") from error
    if not callable(function):
        why = "is not a function" if function is not None else f"is not in module {module}"
        raise ConfigError(f"{group}={name}: {attribute} {why}")
    return function


def _same_type(value: object, default: object) -> bool:
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(default))


def _takes_list(annotation: object) -> bool:
    """Return whether a union of types, such as `str | list[float]`, contains a list."""
    return any(get_origin(kind) is list for kind in get_args(annotation))


def _kind(default: object) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list"}
    return kinds.get(type(default), f"a {type(default).__name__}")


def _defines_build(path: Path) -> bool:
    return "\ndef build(" in path.read_text(encoding="utf-8")
