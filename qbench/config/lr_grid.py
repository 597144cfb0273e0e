"""`lr_search=grid`: one configuration becomes a run for each learning rate of a grid, the same for every method.

The runs are ordinary ones; `report.choice` chooses among them, on validation.
"""

import dataclasses
import json
import math
from functools import lru_cache

from qbench.config import registry
from qbench.config.schema import Config, LearningRateGrid, scaled
from qbench.errors import ConfigError


def runs(config: Config) -> list[Config]:
    """Return the runs that a composed configuration asks for: itself or, with lr_search=grid, one for each rate.

    `optim.lr_end` is scaled as `optim.lr` is. What trains nothing, and a float parent, is one run.

    Raises:
        ConfigError: a grid without lr_search=grid, or nothing held out to choose on.
    """
    grid = config.lr_grid
    if grid.lr is not None or grid.lr_end is not None:
        raise ConfigError(
            "lr_grid.lr and lr_grid.lr_end are what a run of a grid stores; set optim.lr and optim.lr_end"
        )
    if config.lr_search != "grid":
        if grid != LearningRateGrid():
            raise ConfigError("lr_grid.factors has no effect without lr_search=grid; add it")
        return [config]
    if config.dataset.get("val") == 0:
        raise ConfigError(
            "dataset.val=0: lr_search=grid chooses on validation images, and none are held out\n"
            "add dataset.val=0.1, or lr_search=none"
        )
    return [_at(config, factor) for factor in grid.factors] if _trains(config) else [config]


def _at(config: Config, factor: float) -> Config:
    """Return the run at one factor of the grid."""
    own = config.optim
    lr, lr_end = scaled(own.lr, factor), scaled(own.lr_end, factor)
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr_grid.factors: {factor:g} times optim.lr={own.lr:g} is no learning rate")
    optim = dataclasses.replace(own, lr=lr, lr_end=lr_end)
    return dataclasses.replace(
        config, optim=optim, lr_grid=LearningRateGrid(config.lr_grid.factors, own.lr, own.lr_end)
    )


def _trains(config: Config) -> bool:
    """Whether any epoch is trained: post-training quantization has none. What cannot be built says so in its turn."""
    nodes = [node for node in (config.method, config.activation) if node["name"] != "none"]
    try:
        return any(_is_trained(json.dumps([node, dataclasses.asdict(config.bits)], sort_keys=True)) for node in nodes)
    except Exception:
        return True


@lru_cache(maxsize=256)
def _is_trained(values: str) -> bool:
    node, widths = json.loads(values)
    return bool(registry.create("method", node, **widths).needs_training)
