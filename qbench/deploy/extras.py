"""Imports optional packages. Only exported files need them."""

import importlib
import warnings
from types import ModuleType

from qbench.errors import ConfigError


def import_extra(module: str, extra: str) -> ModuleType:
    """Return a module of an optional dependency.

    Args:
        extra: name of the optional group in pyproject.toml that contains the package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(module)
    except ImportError:
        packages = {"onnx": "onnx onnxruntime", "openvino": "openvino", "qonnx": "qonnx", "fast": "numba"}[extra]
        raise ConfigError(
            f"the package {module.partition('.')[0]} is missing\ninstall it: pip install {packages}"
        ) from None
