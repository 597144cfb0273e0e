"""Imports a user's own function or class: `package.module:name`."""

import inspect
import os
from pathlib import Path
from types import ModuleType

from qbench.config.schema import did_you_mean
from qbench.config.signature import Factory
from qbench.config.users_modules import import_current, search_working_directory
from qbench.errors import ConfigError, QbenchError
from qbench.system.tracebacks import error_text


def users_function(group: str, name: str) -> Factory:
    """Return the function or class that `name` refers to.

    Raises:
        ConfigError: the name is not valid, or the module, function or class does not exist.
        QbenchError: the code of the module raises an error when it is imported.
    """
    module_name, _, attribute = name.partition(":")
    search_working_directory()  # the user's file may be there
    _check_name(group, module_name, attribute)
    try:
        module = import_current(module_name)
    except ImportError as error:
        hint = did_you_mean(module_name, [path.stem for path in Path().glob("*.py")])
        raise ConfigError(f"{group}={name}: {error}{hint}; searched {os.getcwd()} and the installed packages") from None
    except Exception as error:
        raise QbenchError(f"{group}={name}: error in your own code: {error_text(error)}") from error
    function: Factory | None = getattr(module, attribute, None)
    if function is None:
        hint = did_you_mean(attribute, own_names(module))
        raise ConfigError(f"{group}={name}: {attribute} is not in module {module_name}{hint}")
    if not callable(function):
        raise ConfigError(f"{group}={name}: {attribute} is not a function")
    if hasattr(function, "parameters") and not inspect.isclass(function):
        raise ConfigError(
            f"{group}={name}: {attribute} is an object of class {type(function).__name__}; every run needs a new "
            f"object, made with the run's seed\ntype the name of the class, or of a function that returns a new object"
        )
    return function


def _check_name(group: str, module: str, attribute: str) -> None:
    """Raise `ConfigError` if a name does not have the form of a module and a function."""
    if all(part.isidentifier() for part in [*module.split("."), attribute]) and not module.endswith(".py"):
        return
    path = module.removesuffix(".py").strip("./").replace("/", ".").replace(os.sep, ".")
    typed = f"{path}:{attribute}" if module.endswith(".py") or "/" in module else "package.module:function"
    raise ConfigError(f"{group}={module}:{attribute}: not a valid name; for your own function, type {group}={typed}")


def own_names(module: ModuleType) -> list[str]:
    """Return the names of the functions and classes that a module defines itself."""
    found = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return [key for key, value in found.items() if callable(value) and value.__module__ == module.__name__]
