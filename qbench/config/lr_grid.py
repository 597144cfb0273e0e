"""Implements `lr_search=grid`, which trains one run per learning rate of a grid.

All methods use the same grid, and each learning rate is an ordinary run. `qbench.report.comparison.lr_selection`
selects the learning rate by validation accuracy.
"""

import dataclasses
import json
import math
from functools import lru_cache

from qbench.config import registry
from qbench.config.schema import Config, LearningRateGrid, scaled
from qbench.errors import ConfigError


def runs(config: Config) -> list[Config]:
    """Return the configurations of the grid, one per learning rate.

    In each configuration, `optim.lr` and `optim.lr_end` are multiplied by one factor of the grid. With lr_search=none,
    for a float baseline or for a run without training, the list contains only `config`.

    Raises:
        ConfigError: keys of the grid are set without lr_search=grid, or there is no validation split for the selection.
    """
    grid = config.lr_grid
    if grid.lr is not None or grid.lr_end is not None:
        raise ConfigError("lr_grid.lr and lr_grid.lr_end are set by qbench; set optim.lr and optim.lr_end instead")
    if config.lr_search != "grid":
        if grid != LearningRateGrid():
            raise ConfigError("lr_grid.factors has no effect without lr_search=grid; add lr_search=grid")
        return [config]
    if config.dataset.get("val") == 0:
        raise ConfigError(
            "dataset.val=0: lr_search=grid needs a validation split\ntype dataset.val=0.1 or lr_search=none"
        )
    return [_at(config, factor) for factor in grid.factors] if _trains(config) else [config]


def _at(config: Config, factor: float) -> Config:
    """Return the configuration with `optim.lr` and `optim.lr_end` multiplied by `factor`."""
    recipe = config.optim
    lr, lr_end = scaled(recipe.lr, factor), scaled(recipe.lr_end, factor)
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr_grid.factors: {factor:g} times optim.lr={recipe.lr:g} is not a valid learning rate")
    grid = LearningRateGrid(config.lr_grid.factors, recipe.lr, recipe.lr_end)
    return dataclasses.replace(config, optim=dataclasses.replace(recipe, lr=lr, lr_end=lr_end), lr_grid=grid)


def _trains(config: Config) -> bool:
    """Return whether a run trains at least one epoch. Post-training quantization trains no epoch.

    If the method cannot be built, return True. The run then reports the error.
    """
    if not config.epochs:
        return False
    nodes = [node for node in (config.method, config.activation) if node["name"] != "none"]
    try:
        return any(_is_trained(json.dumps([node, dataclasses.asdict(config.bits)], sort_keys=True)) for node in nodes)
    except Exception:
        return True


@lru_cache(maxsize=256)
def _is_trained(values: str) -> bool:
    node, widths = json.loads(values)
    return bool(registry.create("method", node, **widths).needs_training)
