"""Checks that the values in a training recipe are consistent."""

import math

from qbench.config.schema import Optim, Pretrain
from qbench.errors import ConfigError


def check_schedule(optim: Optim, path: str) -> None:
    """Check the learning-rate schedule of a recipe.

    `path` is the prefix of the recipe's keys, such as `pretrain.optim.`.
    """
    marks = optim.milestones
    if marks != sorted(marks) or not all(0 < mark < 1 for mark in marks):
        raise ConfigError(f"{path}milestones={marks}: must be ascending fractions of a phase, all between 0 and 1")
    if optim.schedule == "step" and not marks:
        raise ConfigError(f"{path}schedule=step needs milestones, such as '{path}milestones=[0.5,0.75]'")
    factors = optim.factors
    if factors and (
        optim.schedule != "step" or len(factors) != len(marks) + 1 or not all(0 < f < math.inf for f in factors)
    ):
        raise ConfigError(
            f"{path}factors={factors}: must be numbers above 0, one for the start and one for each milestone; "
            "allowed only with schedule=step\n"
            f"such as '{path}milestones=[0.5,0.75]' '{path}factors=[1,0.5,0.1]'"
        )
    if optim.schedule == "one_cycle" and optim.warmup:
        raise ConfigError(f"{path}schedule=one_cycle has a warm-up of its own; remove {path}warmup")
    if optim.schedule == "exponential" and not 0 < optim.lr_end <= optim.lr:
        raise ConfigError(
            f"{path}lr={optim.lr:g} with {path}lr_end={optim.lr_end:g}: an exponential schedule needs 0 < lr_end <= lr"
        )
    if optim.nesterov and not optim.momentum:
        raise ConfigError(f"{path}nesterov=true needs {path}momentum above 0")


def check_recipes(optim: Optim, epochs: int, pretrain: Pretrain) -> None:
    """Check the recipe of a run and the recipe of its float baseline."""
    for path, recipe, length in (("", optim, epochs), ("pretrain.", pretrain.optim, pretrain.epochs)):
        if length and recipe.warmup >= length:
            raise ConfigError(f"{path}optim.warmup={recipe.warmup:g}: must be below {path}epochs={length}")
    if (pretrain.optim.quantizer_lr, pretrain.optim.quantizer_decay) != (1.0, None):
        raise ConfigError(
            "pretrain.optim.quantizer_lr and quantizer_decay have no effect: a float baseline has no quantizers\n"
            "type optim.quantizer_lr or optim.quantizer_decay"
        )
