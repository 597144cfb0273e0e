"""Checks that a configuration's parts fit together, before anything is written."""

import shutil

import torch
from torch import nn

from qbench.bits import FLOAT
from qbench.config.schema import Config
from qbench.errors import ConfigError
from qbench.experiment.device import COMPILERS
from qbench.quant.method import Method, Unsupported


def check_requirements(config: Config, method: Method) -> None:
    """Refuse keys of the network that were set against what the method requires."""
    needs = {
        "norm": method.requires.norm,
        "act": None if method.requires.act == "either" else method.requires.act,
    }
    if method.bits.a == 32:
        del needs["act"]
    for key, need in needs.items():
        got = config.model.get(key, "auto")
        if need is not None and got not in ("auto", need):
            raise ConfigError(
                f"model.{key}={got} contradicts method={method.name}, which requires {need}; leave model.{key}=auto"
            )
    if config.model.get("act") == "fused" and config.bits.a == 32:
        raise Unsupported("model.act=fused has no effect at bits.a=32: no quantizer takes the activation's place")


def check_runtime(config: Config, method: Method, device: torch.device) -> None:
    """Refuse what would have no effect, or cannot be had here."""
    runtime = config.runtime
    cells = "cells_input" in method.traits and method.bits.a <= 8
    if runtime.compress_activations and not config.is_parent and not cells:
        why = "no activations are quantized" if method.bits.a == FLOAT else "its backward pass needs what was quantized"
        raise ConfigError(f"runtime.compress_activations=true has no effect with {method.name} {method.bits}: {why}")
    if runtime.compile and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise ConfigError(
            f"runtime.compile=true needs a C++ compiler on the CPU; none of {', '.join(COMPILERS)} is here"
        )


def check_norm(model: nn.Module, method: Method) -> None:
    """A network that is not ours does not say its normalization: look at it."""
    norms = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    affine = any(getattr(m, "affine", False) for m in norms)
    if method.requires.norm == "no_affine" and not hasattr(model, "norm") and (affine or not norms):
        found = "has both" if affine else "has none"
        raise Unsupported(
            f"{method.name} requires batch normalization without scale and shift; {type(model).__name__} {found}"
        )
