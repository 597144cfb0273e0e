"""Compiles the functions of kernels. The functions are closures over sizes, so that LLVM can unroll loops."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

from numba import njit
from numba.core.registry import cpu_target

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function, **options: bool) -> Function:
    """Compile a function that other compiled functions call. The name of the function gets a hash of its constants.

    numba finds functions in stored code by name. Without the hash, functions made by the same factory would have the
    same name. A stored network would then call the functions of another network.
    """
    constants = [_described(cell.cell_contents) for cell in function.__closure__ or ()]
    function.__qualname__ += "_" + hashlib.sha256(repr(constants).encode()).hexdigest()[:16]
    result: Function = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
    return result


def inlined(function: Function) -> Function:
    """Return a compiled function whose code LLVM copies into its callers."""
    return compiled(function, forceinline=True)


def _described(constant: object) -> str:
    """Return a text that identifies a constant, which is a number, a text, or a compiled function."""
    name = getattr(getattr(constant, "py_func", constant), "__qualname__", None)
    return repr(constant) if name is None else str(name)


def has(feature: str) -> bool:
    """Return whether code is compiled for a processor with a feature. LLVM defines the names, such as `avx2`."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")
