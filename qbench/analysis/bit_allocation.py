"""Chooses one bit width for each layer by integer programming, so that the whole network meets a budget."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from qbench.errors import ConfigError
from qbench.report.tables.units import si_format

WidthValues = Mapping[str, Mapping[int, float]]
"""Layer name -> width in bits -> value, such as a loss or a cost."""

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
TOLERANCE = 1e-6
"""The solver's solution may exceed the budget by this fraction of the budget."""


class Budget(NamedTuple):
    """An upper limit on one kind of cost of a network.

    The kind is `bytes`, `bitops` or `w`, where `w` is the mean number of bits per quantized weight.
    """

    kind: str
    limit: float

    def __str__(self) -> str:
        return f"{self.kind}={si_format(self.limit, digits=4, gap='')}"


class BudgetInfeasible(ValueError):
    """Raised if no choice of widths meets the budget."""


def parse_budget(text: str) -> Budget:
    """Parse a budget such as bytes=20k, bitops=1G or w=3.

    Raises:
        ConfigError: the text is not of the form KIND=LIMIT.
    """
    match = re.fullmatch(r"(bytes|bitops|w)=(\d+(?:\.\d*)?|\.\d+)([kMGT]?)", text)
    if not match or (match[1] == "w" and match[3]):
        raise ConfigError(
            f"--budget {text}: must be a kind of cost and its limit\ntype for example bytes=20k, bitops=1G or w=3 "
            f"(k, M, G and T are powers of 1000)"
        )
    return Budget(match[1], float(match[2]) * UNITS[match[3]])


def sum_over_layers(values: WidthValues, widths: Mapping[str, int]) -> float:
    """Return the sum of the layers' values, each at the layer's chosen width."""
    return sum(values[name][width] for name, width in widths.items())


def cost_range(costs: WidthValues) -> tuple[float, float]:
    """Return the lowest and the highest total cost over all choices of widths."""
    return sum(min(layer.values()) for layer in costs.values()), sum(max(layer.values()) for layer in costs.values())


def allocate_widths(loss: WidthValues, costs: WidthValues, limit: float) -> dict[str, int]:
    """Return one width per layer. These widths have the smallest sum of losses at a total cost of at most `limit`.

    scipy's milp (HiGHS) solves the problem, with one binary variable for each layer and width.

    Args:
        loss: loss of each layer at each width.
        costs: cost of each layer at each width, for the same layers and widths as `loss`. Every layer has at least one
            width.
        limit: upper limit of the total cost.

    Raises:
        BudgetInfeasible: even the cheapest widths cost more than `limit`.
    """
    if cost_range(costs)[0] > limit:
        raise BudgetInfeasible(f"the lowest cost is {cost_range(costs)[0]:g}")
    for bound in (limit, limit * (1 - TOLERANCE), limit * (1 - 10 * TOLERANCE)):
        widths = _solve(loss, costs, bound)
        if widths and sum_over_layers(costs, widths) <= limit:
            return widths
    return {name: min(layer, key=lambda width: layer[width]) for name, layer in costs.items()}


def _solve(loss: WidthValues, costs: WidthValues, limit: float) -> dict[str, int] | None:
    """Solve the integer program, and return the best width of each layer, or None if there is no solution."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(name, width) for name, layer in loss.items() for width in layer]
    objective = np.array([loss[name][width] for name, width in pairs])
    spent = np.array([costs[name][width] for name, width in pairs])
    # every layer has exactly one width
    once = np.array([[name == layer for name, _ in pairs] for layer in loss], dtype=float)
    # the solver's tolerances are absolute: scale objective and budget to about 1
    unit, scale = max(limit, 1e-300), float(np.abs(objective).max()) or 1.0
    solved = milp(
        objective / scale,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(spent[None] / unit, -np.inf, limit / unit)],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return {name: width for (name, width), x in zip(pairs, solved.x, strict=True) if x > 0.5}


def largest_uniform_width(costs: WidthValues, limit: float) -> dict[str, int] | None:
    """Return the widths of the best uniform allocation, in which all layers have the same width.

    The common width is the largest width that every layer supports and that keeps the total cost within the limit.
    Return None if there is no such width.
    """
    shared = set.intersection(*(set(layer) for layer in costs.values()))
    for width in sorted(shared, reverse=True):
        if sum(layer[width] for layer in costs.values()) <= limit:
            return dict.fromkeys(costs, width)
    return None
