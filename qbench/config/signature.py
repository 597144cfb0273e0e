"""Inspects the arguments of the functions and classes that build methods, models and data sets.

qbench recognizes some arguments by name and fills them in: a method's bit widths, the shape of an image, and the number
of classes. Every other argument must have a default value, and becomes a key of the configuration. The values of this
key must have the type of the default value.
"""

import inspect
from collections.abc import Callable, Container, Mapping
from inspect import Parameter
from typing import Any, get_args, get_origin

from qbench.errors import ConfigError

Factory = Callable[..., Any]

CLASS_COUNTS = ("classes", "num_classes", "n_classes")
"""Allowed names of the argument for the number of classes."""

FILLED = {"method": ("w", "a", "g"), "model": ("shape", *CLASS_COUNTS), "dataset": ()}
"""Group -> the arguments that qbench fills in.

The default values of a method's bit widths become the method's key `bits`.
"""

FORMS = {
    "method": "build(*, w=2, a=32, g=32)",
    "model": "Net(), Net(num_classes) or build(shape, classes)",
    "dataset": "build()",
}
"""Group -> the calls that qbench tries, as text for messages."""


def arguments(group: str, name: str, factory: Factory) -> Mapping[str, Parameter]:
    """Return the arguments of a function or class that can be passed by name.

    A function that builds a network may have `**kwargs` but no known name for the number of classes. Such a
    function is assumed to accept `num_classes`, because torchvision's functions accept this name.

    Raises:
        ConfigError: Python does not know the arguments, as is the case for some functions written in C.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise ConfigError(f"{group}={name}: Python does not know its arguments\nallowed: {FORMS[group]}") from None
    named = {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    kinds = {p.kind for p in parameters.values()}
    takes_any = Parameter.VAR_KEYWORD in kinds and Parameter.VAR_POSITIONAL not in kinds  # nn.Module takes both
    if group == "model" and takes_any and not named.keys() & set(CLASS_COUNTS):
        named["num_classes"] = Parameter("num_classes", Parameter.KEYWORD_ONLY)
    return named


def default_values(group: str, known: Mapping[str, Parameter]) -> dict[str, object]:
    """Return the default values of the arguments that become keys. Values that YAML cannot represent are left out."""
    values = {key: p.default for key, p in known.items() if key not in FILLED[group]}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if value is not Parameter.empty and _is_plain(value)
    }


def check_missing(group: str, name: str, known: Mapping[str, Parameter], given: Container[str]) -> None:
    """Raise `ConfigError` if an argument is not given and has no default value."""
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in given:
            raise ConfigError(
                f"{group}={name}: its argument {key} has no value; qbench tried {FORMS[group]}\n"
                f"give {key} a default value in the code; you can then type {group}.{key}=VALUE"
            )


def has_type(value: object, parameter: Parameter) -> bool:
    """Return whether a value has the type of an argument's default value, or a type from the argument's annotation.

    In a union such as `str | float | list[float]`, only the members `float` and `list` are recognized.
    """
    others = {get_origin(kind) or kind for kind in get_args(parameter.annotation)}
    if isinstance(value, bool):
        return _same_type(value, parameter.default)
    return (
        _same_type(value, parameter.default)
        or (isinstance(value, list) and list in others)
        or (isinstance(value, int | float) and float in others)
    )


def type_name(default: object) -> str:
    """Return the type of a default value in words, such as `a whole number`."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "a list"}
    return kinds.get(type(default), f"a {type(default).__name__}")


def _same_type(value: object, default: object) -> bool:
    if default is None or default is Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(default))


def _is_plain(value: object) -> bool:
    """Return whether YAML can represent a value exactly."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
