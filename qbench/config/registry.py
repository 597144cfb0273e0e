"""Maps names to functions that build methods, models and data sets.

A name refers to one of three things: a file below `qbench/<group>/` with a function `build`; an entry point that
another package registers in the group `qbench.<group>`; or a user's function or class, `package.module:name`. A
configuration node contains a name and the arguments of the named function (see `signature.py`).
"""

import ast
import hashlib
import importlib
import inspect
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.config.identity import ADDED
from qbench.config.schema import Node, did_you_mean
from qbench.config.signature import FILLED, Factory, arguments, check_missing, default_values, has_type, type_name
from qbench.config.users_code import users_function
from qbench.config.users_modules import executed_digest, search_working_directory
from qbench.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

GROUPS = {"method": "methods", "model": "models", "dataset": "data"}
ENTRY_POINTS = {"method": "qbench.methods", "model": "qbench.models", "dataset": "qbench.datasets"}
VAL = 0.1
"""Fraction of the training images that becomes the validation split if a user's data set returns no such split."""

RECIPE = {"pretrain": 60, "finetune": 30, "lr": 1e-3, "lr_end": 1e-5}
"""Epochs and learning rates of Adam for a user's data set, if no YAML file states a recipe for this data set."""

DIGITS = 12
"""Number of digits of the digest of a user's file that a configuration stores."""

NOT_ARGUMENTS = ("name", "family", "recipe", "source", "deviation", ADDED)
"""Keys of a node that are not arguments of the function that the node names."""


def names(group: str) -> list[str]:
    """Return the names in a group: first the names in qbench, then the names that other packages register.

    Users' own functions are not included.
    """
    folder = Path(__file__).parents[1] / GROUPS[group]
    return sorted(path.stem for path in folder.glob("*.py") if _defines_build(path)) + entry_names(group)


def entry_names(group: str) -> list[str]:
    """Return the names that other installed packages register."""
    return sorted(entry.name for entry in _entry_points(group))


def _entry_points(group: str) -> "EntryPoints":
    """Return the entry points that other installed packages register for a group."""
    from importlib.metadata import entry_points  # late, because the import would slow down printing a stored row

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
    """Return the letters of the bit widths that a method accepts, without importing the method's module.

    For example, `wa` means that the method accepts widths of weights and activations. A method outside qbench is
    assumed to accept all three widths.
    """
    path = Path(__file__).parents[1] / GROUPS["method"] / f"{name}.py"
    if not name.isidentifier() or not path.exists():
        return "wag"
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    arguments = next(f.args.kwonlyargs for f in functions if f.name == "build")
    return "".join(argument.arg for argument in arguments if argument.arg in ("w", "a", "g"))


def known_deviations(name: str) -> dict[str, tuple[str, str]]:
    """Return a map from the names of a method's known deviations to (description, source).

    A deviation is a difference between public code and the paper. The module of the method is not imported.
    """
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
    """Split a method card into a map from headings to texts.

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
        return users_function(group, name)
    if name.isidentifier() and find_spec(f"qbench.{GROUPS[group]}.{name}"):
        build: Factory = importlib.import_module(f"qbench.{GROUPS[group]}.{name}").build
        return build
    for entry in _entry_points(group).select(name=name):
        return entry.load()  # type: ignore[no-any-return]
    known = names(group)
    raise ConfigError(f"{group}={name}: no such {group}{did_you_mean(name, known)}\nallowed: {', '.join(known)}")


def create(group: str, node: Mapping[str, object], **fixed: object) -> Any:
    """Call the function that a node names, with the node's other keys as arguments.

    Args:
        node: the key `name`, arguments of the function, and optionally `family`. `family` is the name of the file with
            the function, if several names share a file.
        fixed: further arguments. Arguments that the function does not accept are ignored.

    Raises:
        ConfigError: the function does not accept a key, a value has the wrong type or is out of range, or a required
            argument has no value.
    """
    factory, options, known = checked(group, node, fixed)
    check_missing(group, str(node["name"]), known, {**options, **fixed})
    try:
        return factory(**options, **{key: value for key, value in fixed.items() if key in known})
    except ValueError as error:
        raise ConfigError(f"{group}.{error}") from None


def checked(
    group: str, node: Mapping[str, object], fixed: Collection[str] = ()
) -> tuple[Factory, Node, Mapping[str, inspect.Parameter]]:
    """Return the function that a node names, the arguments that the node gives, and all arguments of the function.

    Raises:
        ConfigError: the function does not accept a key, a key is in `fixed`, or a value has the wrong
            type.
    """
    name = str(node["name"])
    factory = find(group, str(node.get("family", name)))
    _refuse_edited(name, node)
    options = {key: value for key, value in node.items() if key not in NOT_ARGUMENTS}
    known = arguments(group, name, factory)
    _refuse_reserved(group, name, known)
    for key, value in list(options.items()):
        if key not in known or key in fixed:
            allowed = [f"{group}.{k}" for k in known if k not in fixed]
            hint = did_you_mean(f"{group}.{key}", allowed)
            raise ConfigError(f"{group}.{key}: {name} has no such key{hint}\nallowed: {', '.join(allowed) or 'none'}")
        if not has_type(value, known[key]):
            default = known[key].default
            raise ConfigError(f"{group}.{key}={value}: must be {type_name(default)}, such as {default}")
        if isinstance(known[key].default, float) and isinstance(value, int):
            options[key] = float(value)
    return factory, options, known


def _refuse_edited(name: str, node: Mapping[str, object]) -> None:
    """Raise `ConfigError` if a user's file was edited after a command had read it, for example during a sweep."""
    module, user, _ = name.partition(":")
    if user and (digest := executed_digest(module)) and node.get("source") not in (None, digest[:DIGITS]):
        raise ConfigError(
            f"{module} was edited after this command had started, so this run would belong to the old file but use the "
            "new code\nto run the new code, repeat the command"
        )


def _refuse_reserved(group: str, name: str, known: Collection[str]) -> None:
    """Raise `ConfigError` if an argument has a name in `NOT_ARGUMENTS`, because qbench never passes such a key."""
    if reserved := [key for key in NOT_ARGUMENTS if key in known]:
        raise ConfigError(
            f"{group}={name}: the argument `{reserved[0]}` has the name of a key that qbench uses itself\n"
            f"rename the argument, for example `{reserved[0]}_`"
        )


def takes(group: str, node: Mapping[str, object], key: str) -> bool:
    """Return whether the function that a node names has an argument with the given name."""
    name = str(node["name"])
    return key in arguments(group, name, find(group, str(node.get("family", name))))


def defaults(group: str, name: str) -> Node:
    """Return a node with the default values of a function's arguments, for a function without a YAML file."""
    factory = find(group, name)
    known = arguments(group, name, factory)
    _refuse_reserved(group, name, known)
    node: Node = default_values(group, known)
    if group == "method":
        widths = {key: known[key].default for key in FILLED["method"] if key in known}
        set_widths = [f"{key}{width}" for key, width in widths.items() if width is not inspect.Parameter.empty]
        node["bits"] = "".join(set_widths) or "w32"
        node |= _requirements(factory)
    if group == "model":
        node |= {"act": "auto", "norm": "auto"} | ({} if "norm" in node else {ADDED: {"norm": "auto"}})
    if group == "dataset":
        node["recipe"] = dict(RECIPE)
        node |= {} if "val" in node else {"val": VAL, ADDED: {"val": VAL}}
    return {"name": name} | node


def users_file(group: str, node: Mapping[str, object]) -> Path | None:
    """Return the file of the function that a node names, if the function is not part of qbench.

    Such a function is written as `package.module:function`, or another installed package registers it. The result is
    None if the function belongs to qbench, or if its file is missing.
    """
    name = str(node.get("name", ""))
    if ":" in name:
        search_working_directory()
        return _module_file(name.partition(":")[0])
    own = str(node.get("family", name))
    if own in ("", "none") or (own.isidentifier() and find_spec(f"qbench.{GROUPS[group]}.{own}")):
        return None
    return next((_module_file(entry.module) for entry in _entry_points(group).select(name=own)), None)


def _module_file(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the package of the module
        return None
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    return file if file is not None and file.is_file() else None


def source_digest(file: Path) -> str:
    """Return the digest of a user's file. The configuration stores it as `source`, next to the function's name."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]


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


def _defines_build(path: Path) -> bool:
    return "\ndef build(" in path.read_text(encoding="utf-8")
