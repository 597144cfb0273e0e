"""Inspects the arguments of the functions and classes that build methods, models and data sets.

qbench fills in some arguments by name: a method's widths, an image's shape, and the number of classes. Every other
argument needs a default value, and becomes a key of the configuration that has the type of this value.
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
"""Group -> the arguments that qbench fills in. The default values of a method's widths are its `bits`."""

FORMS = {
    "method": "build(*, w=2, a=32, g=32)",
    "model": "Net(), Net(num_classes) or build(shape, classes)",
    "dataset": "build()",
}
"""Group -> the calls that qbench tries, for messages."""


def arguments(group: str, name: str, factory: Factory) -> Mapping[str, Parameter]:
    """Return the arguments of a function or class that can be given by name.

    A function of a network with `**kwargs` and without a known name for the number of classes has the argument
    `num_classes` too, as the functions of torchvision do.

    Raises:
        ConfigError: the arguments are not known, as those of some functions written in C.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise ConfigError(f"{group}={name}: its arguments are not known\nallowed: {FORMS[group]}") from None
    named = {key: p for key, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    kinds = {p.kind for p in parameters.values()}
    takes_any = Parameter.VAR_KEYWORD in kinds and Parameter.VAR_POSITIONAL not in kinds  # both: nn.Module's own
    if group == "model" and takes_any and not named.keys() & set(CLASS_COUNTS):
        named["num_classes"] = Parameter("num_classes", Parameter.KEYWORD_ONLY)
    return named


def default_values(group: str, known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the default values of the arguments that are keys. Values that YAML cannot represent are left out."""
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
                f"{group}={name}: no value for its argument {key}; tried {FORMS[group]}\n"
                f"give {key} a default value: it then becomes the key {group}.{key}"
            )


def has_type(value: object, parameter: Parameter) -> bool:
    """Return whether a value has the type of an argument's default, or another type of its annotated union.

    In a union such as `str | float | list[float]`, only numbers and lists are recognized.
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
    """Return in words the type that a value must have."""
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
