"""Delays torch's import of its compiler until something is compiled. The import takes over a second and 70 MiB.

torch imports the compiler in every step of an optimizer, and in many functions for tensors on the meta device. torch
does this only to leave these functions out of compilation. As long as nothing is compiled, the import has no effect.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

COMPILER = "torch._dynamo"

Function = TypeVar("Function", bound=Callable[..., object])


class _Placeholder(ModuleType):
    """Stands for the compiler. The compiler is imported when anything but the two functions below is needed."""

    @staticmethod
    def disable(function: Function, *args: object, **kwargs: object) -> Function:
        """Return a function that is left out of compilation."""
        return function

    @staticmethod
    def graph_break(*args: object, **kwargs: object) -> None:
        """End the part of the code that is compiled as one graph."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__path__":  # read by code that looks at all modules
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def delay_import_of_compiler() -> None:
    """Delay the import of torch's compiler until torch compiles something. Do nothing if it is already imported."""
    sys.modules.setdefault(COMPILER, _Placeholder(COMPILER))
