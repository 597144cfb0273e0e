"""Compiles the functions of kernels. All of them are closures over sizes, so that LLVM unrolls their loops."""

import hashlib
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.registry import cpu_target

Function = Callable[..., Any]


def compiled(function: Function, **options: bool) -> Function:
    """Return a function for other compiled functions, whose name states the constants of its closure.

    In stored code, numba finds functions by name. Functions of one factory would have the same name,
    and one stored network would call those of another.
    """
    constants = [_described(cell.cell_contents) for cell in function.__closure__ or ()]
    function.__qualname__ += "_" + hashlib.sha256(repr(constants).encode()).hexdigest()[:16]
    result: Function = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
    return result


def inlined(function: Function) -> Function:
    """Return a compiled function whose code LLVM copies into its callers."""
    return compiled(function, forceinline=True)


def _described(constant: Any) -> str:
    """Return a text that differs for different constants: numbers, texts, or compiled functions."""
    name = getattr(getattr(constant, "py_func", constant), "__qualname__", None)
    return repr(constant) if name is None else str(name)


def has(feature: str) -> bool:
    """Return whether code is compiled for a processor with a feature that LLVM knows, such as `avx2`."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")
